"""The distillation loss on CUDA: each position's divergences in one pass over the logits, then a gradient.

A row is a position's logits. The first kernel keeps six numbers of it, so that the second one computes the
gradient from the logits as they are read again: beside the gradient nothing of their size is written.

Where a probability is 0, for a logit of -inf or one that is so much less than the largest, it adds nothing
to the sum that it is a factor of (0 log 0 is 0, as is 0 inf), and a divergence with the factor 0 counts as
none. So a token that both have masked changes nothing; one that only the teacher has leaves KL(teacher |
student) as it is and makes KL(student | teacher) infinite, and the other way round. `losses` in PyTorch has
NaN there. As there, a row with NaN, +inf or no finite logit at all is NaN; one that is not kept is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import FLOATS, expect_tensor, require
from .language import INTERPRET, chunk_of_rows, launch_rows, rows_of_program, triton_op, wrap_triton

#: 16 elements of both a thread, which are two loads of 16 bytes each.
WARPS = 8


@triton.jit
def _exp(x):
    """`tl.exp`, but 0 for results below the least normal number, which cost that more than the others do."""
    if INTERPRET:
        return tl.exp(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _raise(largest, x):
    """The largest of each row with more, what exponents are relative to, and the factor on earlier sums."""
    raised = tl.maximum(largest, tl.max(x, axis=1))
    base = tl.where(raised == float("-inf"), 0.0, raised)
    return raised, base, tl.where(largest == float("-inf"), 0.0, _exp(largest - base))


@triton.jit
def _times(factor, x):
    """`factor * x`, and 0 where the factor is 0, whatever x is."""
    return tl.where(factor == 0, 0.0, factor * x)


@triton.jit
def divergence_rows_kernel(
    student_ptr, teacher_ptr, keep_ptr, known_ptr, rows, SIZE: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Largest logit and log of the sum relative to it, of student and teacher, and both divergences."""
    row = rows_of_program(ROWS)
    kept = tl.load(keep_ptr + row, mask=row < rows, other=0) != 0
    s_largest, t_largest = (
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
    )
    s_sum, t_sum = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    s_gap, t_gap = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        exists = exists & kept[:, None]
        s = tl.load(student_ptr + offsets, mask=exists, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher_ptr + offsets, mask=exists, other=float("-inf")).to(tl.float32)
        s_largest, s_base, s_factor = _raise(s_largest, s)
        t_largest, t_base, t_factor = _raise(t_largest, t)
        gap, p, q = s - t, _exp(s - s_base[:, None]), _exp(t - t_base[:, None])
        s_sum = s_sum * s_factor + tl.sum(p, axis=1)
        t_sum = t_sum * t_factor + tl.sum(q, axis=1)
        s_gap = _times(s_factor, s_gap) + tl.sum(_times(p, gap), axis=1)
        t_gap = _times(t_factor, t_gap) - tl.sum(_times(q, gap), axis=1)
    s_log, t_log = tl.log(s_sum), tl.log(t_sum)
    # The mean gap first loses what is common to all tokens, which may be large and would be rounded with it.
    reverse = (tl.div_rn(s_gap, s_sum) - (s_largest - t_largest)) - (s_log - t_log)
    forward = (tl.div_rn(t_gap, t_sum) - (t_largest - s_largest)) - (t_log - s_log)
    known_ptr += 6 * row
    tl.store(known_ptr, tl.where(kept, s_largest, 0.0), mask=row < rows)
    tl.store(known_ptr + 1, tl.where(kept, s_log, 0.0), mask=row < rows)
    tl.store(known_ptr + 2, tl.where(kept, t_largest, 0.0), mask=row < rows)
    tl.store(known_ptr + 3, tl.where(kept, t_log, 0.0), mask=row < rows)
    tl.store(known_ptr + 4, tl.where(kept, reverse, 0.0), mask=row < rows)
    tl.store(known_ptr + 5, tl.where(kept, forward, 0.0), mask=row < rows)


@triton.jit
def divergence_grad_kernel(
    student_ptr, teacher_ptr, known_ptr, weight_ptr, b_ptr, grad_ptr, rows,
    SIZE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`weight * (b p (log(p / q) - KL(p | q)) + (1 - b) (p - q))`, p the student's and q the teacher's."""
    row = rows_of_program(ROWS)
    b, weight = tl.load(b_ptr), tl.load(weight_ptr + row, mask=row < rows, other=0.0)[:, None]
    known_ptr += 6 * row
    s_largest = tl.load(known_ptr, mask=row < rows, other=0.0)[:, None]
    s_log = tl.load(known_ptr + 1, mask=row < rows, other=0.0)[:, None]
    t_largest = tl.load(known_ptr + 2, mask=row < rows, other=0.0)[:, None]
    t_log = tl.load(known_ptr + 3, mask=row < rows, other=0.0)[:, None]
    reverse = tl.load(known_ptr + 4, mask=row < rows, other=0.0)[:, None]
    for start in range(0, SIZE, CHUNK):
        offsets, exists = chunk_of_rows(row, rows, start, SIZE, CHUNK)
        counts = exists & (weight != 0)
        log_p = (tl.load(student_ptr + offsets, mask=counts, other=0.0).to(tl.float32) - s_largest) - s_log
        log_q = (tl.load(teacher_ptr + offsets, mask=counts, other=0.0).to(tl.float32) - t_largest) - t_log
        p, q = _exp(log_p), _exp(log_q)
        grad = _times(b, _times(p, (log_p - log_q) - reverse)) + _times(1 - b, p - q)
        tl.store(grad_ptr + offsets, _times(weight, grad).to(grad_ptr.dtype.element_ty), mask=exists)


@triton_op("w2a4::divergence_rows")
def divergence_rows(student: Tensor, teacher: Tensor, keep: Tensor) -> Tensor:
    """What the divergences of p = softmax(student) and q = softmax(teacher) are made of.

    Args:
        student, teacher: float32, float16 or bfloat16 `[n, vocabulary]`, each of its own dtype, contiguous.
        keep: bool `[n]`, the rows that count.

    Returns:
        float32 `[n, 6]`: of the student the largest logit, and the log of the sum of exponentials relative
        to it, of the teacher the same, then KL(p | q) and KL(q | p); zeros in rows that do not count.
    """
    known = _empty_rows(student, teacher, keep)
    size = student.shape[1]
    # A bool is a byte.
    tensors = student, teacher, keep.view(torch.uint8), known
    launch_rows(wrap_triton(divergence_rows_kernel), student, size, *tensors, num_warps=WARPS)
    return known


@triton_op("w2a4::divergence_grad")
def divergence_grad(student: Tensor, teacher: Tensor, known: Tensor, weight: Tensor, b: Tensor) -> Tensor:
    """The gradient of `sum(weight * (b KL(p | q) + (1 - b) KL(q | p)))` to student, in its dtype.

    Args:
        student, teacher: as in `divergence_rows`.
        known: what that gave.
        weight: float32 `[n]`, 0 where a row does not count.
        b: float32 `[]`, taken for a constant.
    """
    grad = _empty_grad(student, teacher, known, weight, b)
    tensors = student, teacher, known, weight, b, grad
    launch_rows(wrap_triton(divergence_grad_kernel), student, student.shape[1], *tensors, num_warps=WARPS)
    return grad


@divergence_rows.register_fake
def _empty_rows(student, teacher, keep):
    _check("divergence_rows", student, teacher)
    expect_tensor("divergence_rows", student.device, "keep", keep, torch.bool, (len(student),))
    return student.new_empty((len(student), 6), dtype=torch.float32)


@divergence_grad.register_fake
def _empty_grad(student, teacher, known, weight, b):
    name, rows = "divergence_grad", len(student)
    _check(name, student, teacher)
    expect_tensor(name, student.device, "known", known, torch.float32, (rows, 6))
    expect_tensor(name, student.device, "weight", weight, torch.float32, (rows,))
    expect_tensor(name, student.device, "b", b, torch.float32, ())
    return torch.empty_like(student)


def _check(op: str, student: Tensor, teacher: Tensor) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        require(op, logits.dtype in FLOATS, f"{name} has dtype {logits.dtype}, expected one of {FLOATS}")
    shaped = student.dim() == 2 and student.shape[1] > 0 and student.is_contiguous()
    require(op, shaped, f"student has shape {[*student.shape]}, expected [n, vocabulary], contiguous")
    expect_tensor(op, student.device, "teacher", teacher, teacher.dtype, student.shape)
