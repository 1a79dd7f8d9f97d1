"""The choice among kernels: every row of the table in docs/kernels.md, W2A4_BACKEND, warnings, torch.compile.

What runs on Triton is compared with the CPU's kernels in `triton_interpreted.py`, on a GPU in
`test_gpu_gemm.py`.
"""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from support.numerics import assert_close
from support.op_arguments import linear_inputs
from support.paths import ROOT
from w2a4 import ops
from w2a4.errors import BackendError
from w2a4.format import fake_quant as quantizers
from w2a4.ops import dispatch, reference

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
MANY, PROMPT = dispatch.GEMV_TOKENS + 1, dispatch.DECODE_TOKENS + 1


@pytest.fixture(autouse=True)
def _as_at_the_start(monkeypatch):
    monkeypatch.setattr(dispatch, "backend", "auto")
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_no_triton", {None: "not interpreted", 0: "triton is not installed"})


@pytest.fixture
def triton(monkeypatch):
    """Everywhere, as if the device were there and the interpreter on."""
    monkeypatch.setattr(dispatch, "_no_triton", {None: "", 0: ""})


def kernel(device, tokens=1, block=128, dtype=torch.bfloat16, compiled=True):
    return dispatch.linear_kernel(device, tokens, block, dtype, compiled)


@pytest.mark.parametrize("device,tokens,compiled,with_triton,without", [
    (CPU, 1, True, "cpu", "cpu"),
    (CPU, 512, True, "cpu", "cpu"),
    (CPU, 512, False, "reference", "reference"),
    (CUDA, 0, True, "cuda", "cuda"),
    (CUDA, 1, True, "cuda", "cuda"),
    (CUDA, MANY - 1, True, "cuda", "cuda"),
    (CUDA, MANY, True, "triton", "cuda"),
    (CUDA, 1, False, "triton", "reference"),
    (CUDA, 512, False, "triton", "reference"),
    (OTHER, 512, False, "reference", "reference"),
    (torch.device("meta"), 512, False, "reference", "reference"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:w2a4's linear layers")
def test_table(device, tokens, compiled, with_triton, without, monkeypatch):
    assert kernel(device, tokens, compiled=compiled) == without
    monkeypatch.setattr(dispatch, "_no_triton", {None: "", 0: ""})
    assert kernel(device, tokens, compiled=compiled) == with_triton


@pytest.mark.parametrize("block,dtype,fits", [
    (32, torch.float32, True), (96, torch.float16, True), (131040, torch.bfloat16, True),
    (48, torch.float32, False), (90, torch.float32, False), (131072, torch.float32, False),
    (128, torch.float64, False),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:w2a4's linear layers")
def test_what_the_gemm_does_not_take_goes_elsewhere(triton, block, dtype, fits):
    assert kernel(CUDA, MANY, block, dtype, True) == ("triton" if fits else "cuda")
    assert kernel(CUDA, 1, block, dtype, False) == ("triton" if fits else "reference")


def test_forced_back_ends(triton, monkeypatch):
    for name in ("cuda", "triton", "reference"):
        monkeypatch.setattr(dispatch, "backend", name)
        assert {kernel(CUDA, tokens) for tokens in (1, 512)} == {name}
    assert kernel(CPU) == "reference"
    monkeypatch.setattr(dispatch, "backend", "triton")
    assert kernel(CPU) == "triton"


@pytest.mark.parametrize("name,device,compiled,message", [
    ("cuda", CPU, True, "on cpu: there it has no kernels; possible here: auto, reference"),
    ("triton", OTHER, False, "on mps: there it has no kernels; possible here: auto, reference"),
    ("triton", CPU, True, "on cpu: not interpreted; possible here: auto, reference"),
    ("cuda", CUDA, False, "on cuda: w2a4._cuda is not loaded; possible here: auto, reference"),
    ("triton", CUDA, True, "on cuda: triton is not installed; possible here: auto, cuda, reference"),
])  # fmt: skip
def test_an_impossible_choice_says_what_is_possible(name, device, compiled, message, monkeypatch):
    monkeypatch.setattr(dispatch, "backend", name)
    with pytest.raises(BackendError) as error:
        kernel(device, MANY, compiled=compiled)
    assert f"W2A4_BACKEND={name}" in str(error.value) and message in str(error.value)


def test_an_impossible_shape(triton, monkeypatch):
    monkeypatch.setattr(dispatch, "backend", "triton")
    with pytest.raises(BackendError, match="groups of 48 inputs, it takes multiples of 32.*auto, cuda"):
        kernel(CUDA, block=48)
    monkeypatch.setattr(dispatch, "backend", "cuda")
    with pytest.raises(
        BackendError, match="w2a4._cuda is not loaded; possible here: auto, triton, reference"
    ):
        kernel(CUDA, compiled=False)


def test_a_slower_path_is_told_once():
    with pytest.warns(UserWarning, match="more than 16 tokens run on the CUDA GEMV.*triton is not installed"):
        kernel(CUDA, MANY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel(CUDA, MANY + 1)
        kernel(CUDA, 1)
        kernel(CPU, 512)


def test_triton_is_looked_for_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_no_triton", {})
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.why_no_triton(0) == "triton is not installed, `pip install triton`"
    monkeypatch.undo()
    dispatch._no_triton[0] = "as before"
    assert dispatch.why_no_triton(0) == "as before"
    del dispatch._no_triton[0]


def test_a_broken_triton_is_none(monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise OSError('no libcuda')")
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or "triton_kernels" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(dispatch, "_no_triton", {})
    assert "triton can not be used (OSError: no libcuda)" in dispatch.why_no_triton(0)


# attention


@pytest.mark.parametrize("name,device,tokens,dtype,head_dim,compiled,with_triton,without", [
    ("auto", CUDA, 1, torch.float16, 128, True, "cuda", "cuda"),
    ("auto", CUDA, PROMPT - 1, torch.float16, 128, True, "cuda", "cuda"),
    ("auto", CUDA, PROMPT, torch.bfloat16, 128, True, "triton", "cuda"),
    ("auto", CUDA, PROMPT, torch.float32, 128, True, "cuda", "cuda"),
    ("auto", CUDA, PROMPT, torch.float16, 258, True, "cuda", "cuda"),
    ("auto", CUDA, 1, torch.float16, 128, False, "triton", "reference"),
    ("auto", CPU, PROMPT, torch.float16, 128, True, "cpu", "cpu"),
    ("auto", CPU, PROMPT, torch.float16, 128, False, "reference", "reference"),
    ("auto", OTHER, PROMPT, torch.float16, 128, False, "reference", "reference"),
    ("cuda", CUDA, PROMPT, torch.float16, 128, True, "cuda", "cuda"),
    ("triton", CUDA, 1, torch.float16, 128, True, "triton", "cuda"),
    ("triton", CUDA, 1, torch.float32, 128, True, "cuda", "cuda"),
    ("triton", CPU, 1, torch.float16, 128, True, "triton", "cpu"),
    ("reference", CUDA, PROMPT, torch.float16, 128, True, "reference", "reference"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:w2a4's attention")
def test_table_of_attention(
    name, device, tokens, dtype, head_dim, compiled, with_triton, without, monkeypatch
):
    monkeypatch.setattr(dispatch, "backend", name)
    assert dispatch.attention_kernel(device, tokens, head_dim, dtype, compiled) == without
    monkeypatch.setattr(dispatch, "_no_triton", {None: "", 0: ""})
    assert dispatch.attention_kernel(device, tokens, head_dim, dtype, compiled) == with_triton


def test_slower_attention_is_told_once():
    with pytest.warns(UserWarning, match="attention of more than 64 tokens.*triton is not installed"):
        dispatch.attention_kernel(CUDA, PROMPT, 128, torch.float16, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.attention_kernel(CUDA, PROMPT, 128, torch.float16, True)
        dispatch.attention_kernel(CUDA, 1, 128, torch.float32, True)


# fake quantisation


@pytest.mark.parametrize("name,device,with_triton", [
    ("auto", CUDA, True), ("auto", CPU, False), ("auto", OTHER, False), ("triton", CUDA, True),
    ("triton", CPU, True), ("triton", OTHER, False), ("cuda", CUDA, False), ("reference", CUDA, False),
])  # fmt: skip
def test_table_of_training(name, device, with_triton, monkeypatch):
    monkeypatch.setattr(dispatch, "backend", name)
    if name == "triton" and device is not OTHER:
        with pytest.raises(BackendError, match="W2A4_BACKEND=triton can not be used"):
            dispatch.has_triton_training(device, torch.bfloat16)
    else:
        assert not dispatch.has_triton_training(device, torch.bfloat16)
    monkeypatch.setattr(dispatch, "_no_triton", {None: "", 0: ""})
    assert dispatch.has_triton_training(device, torch.bfloat16) is with_triton
    assert not dispatch.has_triton_training(device, torch.float64)


def test_forced_to_the_reference_no_kernel_is_left(monkeypatch):
    x = torch.randn(2, 8)
    auto = ops.has_training_kernels(x), ops.has_layer_kernel(x)
    assert auto == (ops._C is not None,) * 2 and not ops.has_training_kernels(x.half())
    monkeypatch.setattr(dispatch, "backend", "reference")
    assert not ops.has_training_kernels(x) and not ops.has_layer_kernel(x)


# torch.compile


class Counted:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.parametrize("bits", [2, 4])
def test_ops_compile_into_one_graph_for_all_token_counts(bits):
    op, counted = getattr(ops, f"linear_w{bits}a4"), Counted()
    torch._dynamo.reset()
    compiled = torch.compile(op, backend=counted, fullgraph=True, dynamic=True)
    for tokens in (3, 5, 8, MANY - 1, MANY, 40):  # 2 is the number of groups, and taken for that
        args = (*linear_inputs(bits, tokens, 24, 64, 32), torch.float32)
        assert_close(compiled(*args), op(*args))
    assert counted.graphs == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_ops_compile_with_aot_eager(bits):
    args = (*linear_inputs(bits, 3, 24, 64, 32), torch.float32)
    op = getattr(ops, f"linear_w{bits}a4")
    compiled = torch.compile(lambda *args: op(*args) + 1, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*args), op(*args) + 1)


@pytest.mark.parametrize("triton_there", [True, False])
def test_the_rule_compiles_into_a_graph_for_few_and_one_for_many_tokens(triton_there, monkeypatch):
    monkeypatch.setattr(dispatch, "_no_triton", {0: "" if triton_there else "triton is not installed"})
    counted = Counted()
    numbers = {"cuda": 1, "triton": 2}

    def choose(x):
        return x + numbers[dispatch.linear_kernel(CUDA, x.shape[0], 64, torch.float32, True)]

    torch._dynamo.reset()
    compiled = torch.compile(choose, backend=counted, fullgraph=True, dynamic=True)
    with pytest.warns(UserWarning, match="not installed") if not triton_there else warnings.catch_warnings():
        for tokens in (2, 5, MANY - 1, MANY, MANY + 1, 500, 3):
            many = triton_there and tokens >= MANY
            assert_close(compiled(torch.zeros(tokens, 1)), torch.full((tokens, 1), 2.0 if many else 1.0))
    assert counted.graphs == 2


# the environment, read when w2a4 is imported

OPS_ONLY = """
import sys, types
sys.modules["w2a4"] = package = types.ModuleType("w2a4")  # the whole package imports transformers
package.__path__ = ["w2a4"]
"""


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", OPS_ONLY + code], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True,
    )  # fmt: skip


def test_an_unknown_back_end():
    done = python("from w2a4 import ops", W2A4_BACKEND="cudnn")
    assert "W2A4_BACKEND=cudnn is not a back end; set one of auto, cuda, triton, reference" in done.stderr


REFERENCE = """
import torch, warnings
warnings.simplefilter("error")
from torch.utils._python_dispatch import TorchDispatchMode
from w2a4 import ops
from w2a4.format import fake_quant as quantizers
assert not any("triton_kernels" in name for name in sys.modules)
class NoKernels(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert "w2a4" not in str(op), op
        return op(*args, **(kwargs or {}))
with NoKernels():
    x, clip = torch.randn(20, 64), torch.tensor([0.9])
    codes, scale = ops.hadamard_a4(x, None, 64, clip)
    weight, levels = torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1, 4, dtype=torch.int8)
    y = ops.linear_w2a4(codes, scale, weight, levels, torch.ones(8, 1).half(), None, 64, torch.float32)
    quantizers.fake_quant_a4(x, clip)
x.requires_grad_()
run = lambda x: ops.hadamard(x, None, 64)
run(x).sum().backward()
assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))
print(tuple(y.shape))
"""


def test_reference_on_a_cpu_calls_no_kernel():
    done = python(REFERENCE, W2A4_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(20, 8)"


def test_ops_on_the_cpu_refuse_other_back_ends(monkeypatch):
    monkeypatch.setattr(dispatch, "backend", "cuda")
    args = linear_inputs(2, 3, 8, 64, 32)
    with pytest.raises(BackendError, match="W2A4_BACKEND=cuda can not be used for tensors on cpu"):
        ops.linear_w2a4(*args, torch.float32)
    x, clip = torch.randn(3, 8), torch.tensor([0.9])
    assert_close(quantizers.fake_quant_a4(x, clip), reference.dequantize_a4(*ops.quantize_a4(x, clip), 8))
