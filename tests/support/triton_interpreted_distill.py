"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: the distillation loss against PyTorch's."""

import pytest
import torch
from w2a4.triton_kernels import distill

from support.capture_lint import CaptureLint
from support.distillation import assert_as_defined, assert_within, definition, with_gradient
from support.numerics import UNIT, assert_close
from support.op_arguments import FLOATS
from w2a4.train.losses import distillation_loss

INF = float("inf")


pytestmark = pytest.mark.usefixtures("on_triton")


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """The kernels that were launched."""
    names, launch = [], distill.launch_rows
    monkeypatch.setattr(
        distill,
        "launch_rows",
        lambda kernel, *a, **kw: names.append(kernel.__name__) or launch(kernel, *a, **kw),
    )
    return names


def logits(rows, vocabulary, dtype=torch.float32, spread=3.0):
    return (spread * torch.randn(rows, vocabulary)).to(dtype)


@pytest.mark.parametrize("kind", ["cakld", "kl"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocabulary", [1, 131, 5000])  # a program holds 4096 elements
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradient(vocabulary, dtype, kind, masked, ran):
    student, teacher = logits(7, vocabulary, dtype), logits(7, vocabulary, dtype)
    mask = torch.tensor([True, False, True, True, False, False, True]) if masked else None
    assert_as_defined(student, teacher, mask, kind)
    assert ran == ["divergence_rows_kernel", "divergence_grad_kernel"]


@pytest.mark.parametrize("ours,theirs", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_the_teacher_may_have_another_dtype(ours, theirs):
    assert_as_defined(logits(3, 131, ours), logits(3, 131, theirs))


@pytest.mark.parametrize("vocabulary", [131, 9000])
def test_one_row(vocabulary):
    assert_as_defined(logits(1, vocabulary), logits(1, vocabulary))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["cakld", "kl"])
@pytest.mark.parametrize("agree", [False, True])
def test_confident_rows(kind, agree, dtype):
    student, teacher = (logits(4, 5000, dtype, 0.1) - 50 for _ in range(2))
    places = torch.tensor([0, 4095, 4096, 4999])
    teacher[range(4), places] = 50
    student[range(4), places if agree else places.flip(0)] = 50
    assert_as_defined(student, teacher, None, kind)


@pytest.mark.parametrize("up", [True, False])
def test_logits_that_grow_from_chunk_to_chunk(up):
    slope = torch.linspace(-100, 100, 13000) * (1 if up else -1)
    assert_as_defined(slope + logits(2, 13000), -slope + logits(2, 13000))
    assert_as_defined(slope + logits(2, 13000), slope + logits(2, 13000))


def test_zero_where_they_agree_but_for_a_constant():
    student = logits(3, 5000)
    loss, grad = with_gradient(student, student + 1024.0)
    # What the sum with 1024 is rounded by.
    assert abs(loss) < 2.0**-13 and grad.abs().max() < 2.0**-13


@pytest.mark.parametrize("kind", ["cakld", "kl"])
def test_no_row_counts(kind):
    loss, grad = with_gradient(logits(4, 131), logits(4, 131), torch.zeros(4, dtype=torch.bool), kind)
    assert loss.item() == 0 and not grad.any()


def test_no_rows():
    loss, grad = with_gradient(logits(0, 131), logits(0, 131))
    assert loss.item() == 0 and grad.shape == (0, 131)


def test_rows_that_do_not_count_are_not_read():
    student, teacher = logits(4, 5000), logits(4, 5000)
    mask = torch.tensor([True, False, True, False])
    want = with_gradient(student, teacher, mask)
    student[1], teacher[3] = float("nan"), INF
    for got, expected in zip(with_gradient(student, teacher, mask), want, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("bad", [float("nan"), INF])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_is_not_finite_shows(whose, bad):
    student, teacher = logits(3, 5000), logits(3, 5000)
    (student if whose == "student" else teacher)[1, 4500] = bad
    loss, grad = with_gradient(student, teacher, None, "kl")
    assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2]].isfinite().all()
    assert with_gradient(student, teacher)[0].isnan()


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_row_of_minus_infinity_is_nan(whose):
    student, teacher = logits(3, 131), logits(3, 131)
    (student if whose == "student" else teacher)[1] = -INF
    loss, grad = with_gradient(student, teacher, None, "kl")
    assert loss.isnan() and grad[1].isnan().all() and grad[[0, 2]].isfinite().all()
    assert with_gradient(student, teacher)[0].isnan()


@pytest.mark.parametrize("kind", ["cakld", "kl"])
@pytest.mark.parametrize("first", [0, 4096])
def test_tokens_that_both_have_masked_are_as_if_not_there(kind, first):
    student, teacher = logits(3, 4996), logits(3, 4996)
    none = torch.full((3, 5000), -INF)
    _, _, off, grad_off = definition(student, teacher, None, kind)
    loss, grad = with_gradient(student, teacher, None, kind, 1.0)
    padded = [torch.cat([each[:, :first], none, each[:, first:]], 1) for each in (student, teacher)]
    got, got_grad = with_gradient(*padded, None, kind, 1.0)
    assert_within(got, loss, 2 * off)
    assert not got_grad[:, first : first + 5000].any()
    rest = torch.cat([got_grad[:, :first], got_grad[:, first + 5000 :]], 1)
    assert_within(rest, grad, 2 * grad_off)


def test_tokens_that_one_has_masked():
    student, teacher = logits(3, 131), logits(3, 131)
    masked = teacher.clone()
    masked[:, 100:] = -INF
    # KL(teacher | student) is finite: tokens that the teacher never chooses do not count in it.
    loss, grad = with_gradient(student, masked, None, "kl", 1.0)
    q = masked.softmax(-1)
    want = (q[:, :100] * (masked.log_softmax(-1) - student.log_softmax(-1))[:, :100]).sum(-1).mean()
    # Sums of 131 numbers of at most 20, and of probabilities, are off by some tens of roundings.
    assert_close(loss, want, rtol=100 * UNIT, atol=100 * UNIT)
    assert_close(grad, (student.softmax(-1) - q) / 3, atol=100 * UNIT / 3)
    assert with_gradient(student, masked)[0] == INF
    assert with_gradient(masked, teacher, None, "kl")[0] == INF


def test_strided_arguments():
    student, teacher, mask = logits(131, 6).T, logits(131, 6).T, torch.rand(12)[::2] < 0.5
    want = with_gradient(student.contiguous(), teacher.contiguous(), mask.contiguous())
    for got, expected in zip(with_gradient(student, teacher, mask), want, strict=True):
        assert_close(got, expected)


def test_a_teacher_from_inference_mode():
    student, teacher = logits(3, 131), logits(3, 131)
    with torch.inference_mode():
        inferred = teacher.clone()
    for got, want in zip(with_gradient(student, inferred), with_gradient(student, teacher), strict=True):
        assert_close(got, want)


def test_backward_twice():
    student, teacher = logits(3, 131).requires_grad_(), logits(3, 131)
    loss = distillation_loss(student, teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(-4 * loss, student)
    assert_close(second, -4 * first)


@pytest.mark.parametrize("kind", ["cakld", "kl"])
def test_a_cuda_graph_would_take_it(kind):
    student, teacher, mask = logits(4, 131).requires_grad_(), logits(4, 131), torch.rand(4) < 0.5
    with CaptureLint() as lint:
        distillation_loss(student, teacher, mask, kind).backward()
    assert not lint.found and lint.ran == {"divergence_rows", "divergence_grad"}


def arguments():
    student, teacher, keep = logits(3, 131).half(), logits(3, 131), torch.ones(3, dtype=torch.bool)
    return student, teacher, keep, torch.rand(3, 6), torch.rand(3), torch.tensor(0.5)


def test_opcheck():
    student, teacher, keep, known, weight, b = arguments()
    checks = dict(test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.w2a4.divergence_rows.default, (student, teacher, keep), **checks)
    torch.library.opcheck(
        torch.ops.w2a4.divergence_grad.default, (student, teacher, known, weight, b), **checks
    )


def bad_arguments():
    student, teacher, keep, known, weight, b = arguments()
    rows = "divergence_rows"
    yield rows, (student.double(), teacher, keep), "student has dtype torch.float64"
    yield rows, (student, teacher.int(), keep), "teacher has dtype torch.int32"
    yield (
        rows,
        (student.T, teacher, keep),
        r"student has shape \[131, 3\], expected \[n, vocabulary\], contiguous",
    )
    yield rows, (student, teacher[:, :-1], keep), r"teacher has shape \[3, 130\], expected \[3, 131\]"
    yield rows, (student, teacher, keep.int()), "keep has dtype torch.int32"
    yield rows, (student, teacher, keep.to("meta")), "keep is on meta, expected cpu"
    grad = "divergence_grad"
    yield grad, (student, teacher, known[:2], weight, b), r"known has shape \[2, 6\], expected \[3, 6\]"
    yield grad, (student, teacher, known, weight.double(), b), "weight has dtype torch.float64"
    yield grad, (student, teacher, known, weight, b[None]), r"b has shape \[1\], expected \[\]"


@pytest.mark.parametrize("name,args,message", list(bad_arguments()))
def test_bad_argument(name, args, message):
    with pytest.raises(RuntimeError, match=f"w2a4.{name}: {message}"):
        getattr(torch.ops.w2a4, name)(*args)
