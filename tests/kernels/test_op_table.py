"""What torch has registered under `w2a4::` is what `w2a4.ops.table` says, down to names and defaults."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from support.numerics import UNIT, assert_close
from support.paths import ROOT, TESTS
from w2a4 import ops
from w2a4.format import fake_quant as quantizers
from w2a4.ops import dispatch, layer, library, reference
from w2a4.ops.table import KERNELS, OPS, Op
from w2a4.train.losses import distillation_loss

DEFINED = [name for name, op in OPS.items() if not op.is_triton_only]
TRITON_ONLY = [name for name, op in OPS.items() if op.is_triton_only]


def names_and_defaults(function) -> list[tuple]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def of_schema(op: Op) -> list[tuple]:
    arguments = torch._C.parse_schema(op.name + op.schema).arguments
    return [
        (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty) for a in arguments
    ]


def has_kernel(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"w2a4::{name}", key)


@pytest.mark.parametrize("name", DEFINED)
def test_schema_is_the_registered_one(name):
    assert str(getattr(torch.ops.w2a4, name).default._schema) == f"w2a4::{name}{OPS[name].schema}"


@pytest.mark.parametrize("name", OPS)
def test_reference_has_the_arguments_of_the_schema(name):
    op = OPS[name]
    assert op.reference.__name__ == name and getattr(reference, name) is op.reference
    assert names_and_defaults(op.reference) == of_schema(op)


@pytest.mark.parametrize("name", DEFINED)
def test_fake_has_the_arguments_of_the_schema_and_is_registered(name):
    assert names_and_defaults(OPS[name].fake) == of_schema(OPS[name])
    assert has_kernel(name, "Meta")


@pytest.mark.parametrize("name", DEFINED)
def test_kernels_are_where_the_table_says(name):
    op = OPS[name]
    assert set(op.kernels) <= set(KERNELS)
    assert has_kernel(name, "CPU") == ("cpu" in op.kernels and library.cpu_module is not None)
    if "triton" not in op.kernels:  # that kernel is there once another test has imported Triton's modules
        assert has_kernel(name, "CUDA") == ("cuda" in op.kernels and library.cuda_module is not None)


@pytest.mark.parametrize("name", DEFINED)
def test_public_function_has_the_arguments_of_the_schema(name):
    public = names_and_defaults(getattr(ops, name))
    if name.startswith("decoder_layer"):  # takes had_k and block_size of a rotation as one
        public = [
            each for p in public for each in (p, *([(f"{p[0]}_block", p[1])] if p[0] in "r3 r4" else []))
        ]
    assert public == of_schema(OPS[name])


def test_an_op_of_triton_alone_has_no_fake_and_no_public_function_here():
    assert TRITON_ONLY
    for name in TRITON_ONLY:
        assert OPS[name].fake is None and not hasattr(ops, name)


def registered() -> dict[str, list[str]]:
    """Names of all ops of w2a4, and of those with a kernel for a key, whether defined or not."""
    found = {"all": torch._C._dispatch_get_all_op_names()}
    for key in ("CPU", "CUDA", "Meta", "CompositeExplicitAutograd"):
        found[key] = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {key: [n.removeprefix("w2a4::") for n in names if n.startswith("w2a4::")]
            for key, names in found.items()}  # fmt: skip


def test_nothing_else_is_registered():
    found = registered()
    assert set(DEFINED) <= set(found["all"]) <= set(OPS)
    assert set().union(*found.values()) <= set(OPS)


INTERPRETED = """
import json, torch
from w2a4.ops import dispatch
assert not dispatch.why_no_triton(None), dispatch.why_no_triton(None)
import test_op_table
schemas = {name: str(getattr(torch.ops.w2a4, name).default._schema) for name in test_op_table.OPS}
print(json.dumps([schemas, test_op_table.registered()]))
"""


def test_ops_of_triton_are_those_of_the_table():
    pytest.importorskip("triton", reason="needs triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(TESTS), str(TESTS / "kernels")])
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    schemas, found = json.loads(run.stdout)
    assert schemas == {name: f"w2a4::{name}{op.schema}" for name, op in OPS.items()}
    assert set(found["all"]) == set(OPS) and set().union(*found.values()) == set(OPS)
    assert set(OPS) == set(found["Meta"])
    by_row_op = {name for name, op in OPS.items() if "triton" in op.kernels and not op.is_triton_only}
    assert by_row_op and by_row_op <= set(found["CPU"]) & set(found["CUDA"])


# modules of another version


def test_signature_has_the_types_alone():
    schema = "(Tensor x, Tensor(a!) codes, SymInt start, float clip, Tensor? starts=None, int n=-1) -> ()"
    want = "some_op(Tensor, Tensor, int, float, Tensor?, int) -> ()"
    assert Op("some_op", schema, torch.add, ("cpu",)).signature == want
    assert OPS["quantize_a4"].signature == "quantize_a4(Tensor, Tensor, int) -> (Tensor, Tensor)"


@pytest.mark.parametrize("change,message", [
    (("hadamard(Tensor, Tensor?, int, bool)", "hadamard(Tensor, int)"), r"lacks hadamard\(Tensor, Tensor\?"),
    (("", "new_op(Tensor) -> Tensor\n"), r"has new_op\(Tensor\) -> Tensor besides"),
])  # fmt: skip
def test_a_module_with_other_kernels_is_refused(change, message):
    class Module:
        signatures = "".join(f"{op.signature}\n" for op in OPS.values() if "cpu" in op.kernels)

    library._check_kernels(Module, "_C", "cpu")
    Module.signatures = Module.signatures.replace(*change, 1)
    with pytest.raises(ImportError, match=f"w2a4._C is of another version: it {message}.*build it"):
        library._check_kernels(Module, "_C", "cpu")


def test_a_module_that_defines_ops_is_not_loaded(monkeypatch, tmp_path):
    """It would end the process."""
    (tmp_path / "_C.abi3.so").write_bytes(
        b"\0quantize_a4(Tensor x, Tensor clip, int group_size=-1) -> Tensor\0"
    )
    monkeypatch.delitem(sys.modules, "w2a4._C", raising=False)
    monkeypatch.setattr(sys.modules["w2a4"], "__path__", [str(tmp_path)])
    with pytest.raises(
        ImportError, match="w2a4._C is of another version: it defines the ops itself; build it"
    ):
        library._load_cpu()


# references that no other test compares with anything


def layer_arguments() -> list:
    """Three tokens of two sequences into caches of eight, from token 2 on: 4-bit and 2-bit linears."""

    def linear(inputs, outputs, bits):
        weight = torch.randint(0, 256, (outputs, inputs * bits // 8)).to(torch.uint8)
        levels = [torch.tensor([-100, -30, 30, 100], dtype=torch.int8).repeat(outputs, 1, 1)] * (bits == 2)
        return [weight, torch.rand(outputs, 1).mul(0.01).half(), torch.tensor([0.9]), *levels]

    def side():
        return ops.quantize_kv4(torch.randn(2, 1, 8, 32), 0.95)

    cos, sin = torch.randn(2, 1, 3, 32)
    return [
        torch.randn(2, 3, 32), cos, sin, None, [torch.rand(32), torch.rand(32)], 1e-5,
        linear(32, 4 * 32, 2), linear(64, 32, 4), linear(32, 128, 4), [*linear(64, 32, 2), torch.randn(32)],
        [32, 64, 32, 64], [-1] * 4, None, 32, None, 64, *side(), *side(), None, None, 2, 0.95, 32**-0.5,
    ]  # fmt: skip


@pytest.mark.skipif(library.cpu_module is None, reason="no compiled kernels")
@pytest.mark.parametrize("paging", [[], [torch.tensor([[8, 9, 4], [5, 6, 7]]), torch.int32]])
@pytest.mark.parametrize("masked", [False, True])
def test_decoder_layer_reference_is_the_kernel_but_for_its_ops(masked, paging, monkeypatch):
    """To the bit, caches included, with the kernels in place of the references that it calls."""
    args = layer_arguments()
    args[3] = (torch.rand(2, 1, 3, 5) < 0.7) if masked else None
    if paging:  # blocks of four tokens
        args[16:20] = [t.view(4, 1, 4, -1) for t in args[16:20]]
        args += [None, paging[0], torch.tensor([[2, 1], [3, 1]], dtype=paging[1])]
    copy = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    plain = reference.decoder_layer(*[a.clone() if isinstance(a, torch.Tensor) else a for a in args])
    for name in ("quantize_a4", "rmsnorm_a4", "silu_mul_hadamard_a4",
                 "linear_w2a4", "linear_w3a4", "linear_w4a4",
                 "rope_append_kv4", "attention_kv4"):  # fmt: skip
        monkeypatch.setattr(layer, name, getattr(ops, name))
    got, want = reference.decoder_layer(*copy), torch.ops.w2a4.decoder_layer(*args)
    assert_close(got, want)
    for index in range(16, 20):
        assert_close(copy[index], args[index])
    assert plain.shape == want.shape and plain.isfinite().all()


@pytest.fixture
def in_pytorch(monkeypatch):
    """`quantizers` without kernels."""
    monkeypatch.setattr(dispatch, "backend", "reference")


def gradients(function, inputs, grad):
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("kv,clip", [(False, 0.8), (False, -0.8), (False, -1.0), (True, 0.8)])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_fake_quant_references(kv, clip, size, in_pytorch):
    x, clip, grad = torch.randn(5, size), torch.tensor([clip]), torch.randn(5, size)
    x[0], x[1, 0], x[2] = 0, 100, 3.25
    function = quantizers.fake_quant_kv4 if kv else quantizers.fake_quant_a4
    y, (to_x, to_clip) = gradients(function, (x, clip), grad)
    assert_close(reference.fake_quant_rows(x, clip, kv), y)
    got_x, got_clip = reference.fake_quant_rows_backward(grad, x, clip, kv)
    assert got_clip.shape == (5,)
    # Sums over rows of terms that are rounded some eight times.
    bound = 8 * UNIT * float((grad.abs().sum(-1) * 16).max())
    assert_close(got_x, to_x, atol=bound)
    assert_close(got_clip.sum().reshape(1), to_clip, atol=bound * float(x.abs().sum()))


@pytest.mark.parametrize("one_sign", [False, True])
def test_ldp_and_snap_references(one_sign, in_pytorch):
    w, shares, grad = torch.randn(3, 2, 32), [torch.randn(3, 2) for _ in range(4)], torch.randn(3, 2, 32)
    w[0] = w[0].abs() if one_sign else w[0]  # the levels come out of order
    y, (to_w, *to_shares) = gradients(
        lambda w, *shares: quantizers.ldp_fake_quant(w.flatten(1), shares, 32).view(w.shape),
        (w, *shares),
        grad,
    )
    got, soft, levels, scale = reference.ldp_forward(w, *shares)
    assert_close(got, y)
    stored = quantizers.ldp_to_codebook(w.flatten(1), shares, 32)
    assert_close(levels, stored[0])
    assert_close(scale, stored[1])
    exact = levels.float() * scale.float()[..., None]
    assert_close(reference.snap(w, exact), y)
    got_w, *got_shares = reference.ldp_backward(grad, w, *shares, soft, levels, scale)
    assert_close(got_w, to_w)
    size = float(grad.abs().sum() * w.abs().max())
    for ours, theirs in zip(got_shares, to_shares, strict=True):
        assert_close(ours, theirs, atol=4 * UNIT * size)
    again, to_soft = reference.snap_backward(grad, w, soft, exact)
    assert_close(again, to_w)
    assert_close(to_soft.sum(-1), grad.sum(-1), atol=4 * UNIT * size)


@pytest.mark.parametrize("kind", ["cakld", "kl"])
def test_divergence_references(kind, in_pytorch):
    student, teacher, keep = (
        torch.randn(4, 131).mul(3),
        torch.randn(4, 131).mul(3),
        torch.ones(4, dtype=torch.bool),
    )
    keep[2] = False
    loss, (to_student,) = gradients(lambda s: distillation_loss(s, teacher, keep, kind), (student,), None)
    known = reference.divergence_rows(student, teacher, keep)
    assert known.shape == (4, 6) and not known[2].any()
    weight = keep.float() / keep.sum()
    b = ((-known[:, 3]).exp() * weight).sum() if kind == "cakld" else torch.zeros(())
    # Logits of some tens, and sums of 131 of them.
    assert_close(((b * known[:, 4] + (1 - b) * known[:, 5]) * weight).sum(), loss, atol=200 * UNIT * 20)
    grad = reference.divergence_grad(student, teacher, known, weight, b)
    assert_close(grad, to_student, atol=200 * UNIT)
