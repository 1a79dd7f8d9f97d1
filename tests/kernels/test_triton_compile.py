"""The machine code of the Triton kernels, compiled without a GPU: tensor cores, spills, layouts."""

import ast
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets (TRITON_INTERPRET=1), so it compiles nothing", allow_module_level=True)

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from w2a4.triton_kernels import attention, distill, fake_quant, gemm, gemm_int8, language, ldp
from w2a4.triton_kernels.tiles import INT8_TILES, TILES

from benchmarks.gates import sass, triton_loops
from benchmarks.gates.triton_loops import ARCHS
from w2a4 import ops
from w2a4.format import fake_quant as quantizers
from w2a4.ops import dispatch


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


# Groups of 128 hold two accumulators, a whole row does not; 32 is less than a step holds.
CASES = [(arch, 128, tile) for arch in ARCHS for tile in TILES]
CASES += [(90, group, tile) for group in (32, 4096) for tile in TILES[2::3]]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("arch,group,tile", CASES)
def test_gemm_machine_code(arch, group, tile, bits):
    case = triton_loops.gemm_case(bits, group, tile)
    code = triton_loops.compile_case(case, arch)
    assert code.stack == 0 and not {"LDL", "STL"} & code.opcodes
    assert triton_loops.tensor_cores(case, arch) & code.opcodes
    assert not {"HMMA", "DMMA", "HGMMA"} & code.opcodes
    assert "LDGSTS" in code.opcodes  # loads run ahead of the products
    if bits == 2:
        assert_packs_lie_in_rows(code.ttgir)
    if group == 128:
        assert triton_loops.breaches(triton_loops.examine(case, arch, code), case) == []


@pytest.mark.parametrize("arch", ARCHS)
def test_gemm_with_several_scales_a_token_rounds_every_product(arch):
    code = triton_loops.compile_case(triton_loops.gemm_case(4, 128, TILES[-1], act_group=128), arch)
    assert code.stack == 0 and not {"LDL", "STL", "FFMA", "FFMA2"} & code.opcodes


@pytest.mark.parametrize(
    "group,act_group,bits", [(128, 4096, 2), (4096, 4096, 2), (4096, 4096, 4), (128, 128, 2), (4096, 128, 4)]
)
@pytest.mark.parametrize("tile", INT8_TILES)
def test_gemm_of_decoded_codes_machine_code(tile, group, act_group, bits):
    case = triton_loops.gemm_case(bits, group, tile, act_group)
    for y in ("bf16", "fp32"):
        case.types["y_desc"] = case.types["y_desc"].replace("bf16", y)
        code = triton_loops.compile_case(case, 90)
        if y == "fp32" and act_group == 128 and tile.m > 128:
            # Layers give 16-bit floats; these triton 3.9 leaves a dozen registers short, 3.6 does not.
            assert code.stack <= 64
            continue
        assert code.stack == 0 and not {"LDL", "STL"} & code.opcodes
        assert {"IGMMA", "UTMALDG", "UTMASTG"} <= code.opcodes
        loop = triton_loops.examine(case, 90, code)
        if min(group, act_group) == 128:
            assert triton_loops.breaches(loop, case) == []
        else:
            assert loop.promotion == 0 and not loop.local
        if act_group == 128:
            # Behind the loop a bias may be added by one: to the product with a power of two, which is exact.
            steps = sass.main_loop(code.body, shortest=True)
            assert not any(i.opcode.startswith("FFMA") for i in steps), "a product that is not rounded"
            assert "LDGSTS" in code.opcodes  # scales of tokens are loaded ahead


@pytest.mark.parametrize("bits", [2, 4])
def test_decoding_moves_16_bytes_at_a_time(bits):
    kernel = gemm_int8.decode_kernel
    types = {name: "*i8" if "out" in name else "*u8" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict(levels_ptr="*i32", a_blocks="i32", weight_blocks="i32", weight_programs="i32")
    constants = dict(BITS=bits, BLOCKS_A_GROUP=1, TOGETHER=128)
    code = triton_loops.compile_case(triton_loops.Case("", kernel, types, constants, 4, 3), 90)
    assert code.stack == 0
    assert {i.opcode for i in code.body if i.opcode.startswith("STG")} == {"STG.E.128"}
    if bits == 2:
        assert_packs_lie_in_rows(code.ttgir)


#: What LDP trains.
LDP = ("beta", "gamma", "s1", "s2")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "kernel,size,constants",
    [
        (kernel, size, {})
        for kernel in (ldp.ldp_forward_kernel, ldp.ldp_backward_kernel)
        for size in (64, 28672)
    ]
    + [(fake_quant.fake_quant_kernel, 128, {"KV": True}), (fake_quant.fake_quant_kernel, 4096, {"KV": False})]
    + [(fake_quant.fake_quant_a4_backward_kernel, 28672, {})]
    + [(fake_quant.fake_quant_a4_backward_kernel, 4096, {})]
    + [(fake_quant.fake_quant_kv4_backward_kernel, 128, {})],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, int) else ""),
)
def test_fake_quant_machine_code(kernel, size, constants, arch):
    chunk = min(triton.next_power_of_2(size), 4096)
    floats = {name for name in kernel.arg_names if name.split("_")[0] in ("clip", "soft")}
    floats |= {"grad_clip_ptr", *(f"{part}{name}_ptr" for part in ("", "grad_") for name in LDP)}
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    types = {name: "*fp32" if name in floats else "*bf16" for name in pointers}
    types |= {name: "i32" for name in ("rows", "groups") if name in kernel.arg_names}
    stored = {"levels_ptr": "*i8", "scale_ptr": "*fp16"}
    types |= {name: type for name, type in stored.items() if name in kernel.arg_names}
    constants = constants | dict(SIZE=size, CHUNK=chunk, ROWS=4096 // chunk)
    code = triton_loops.compile_case(triton_loops.Case("", kernel, types, constants, 4, 3), arch)
    assert code.stack == 0 and not {"LDL", "STL"} & code.opcodes
    # Triton's `/` is one of these: off by a bit here and there, which moves codes.
    assert not re.search(r"(div|rcp)\.(full|approx)", code.ptx)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", [distill.divergence_rows_kernel, distill.divergence_grad_kernel])
@pytest.mark.parametrize(
    "vocabulary,dtypes", [(49152, "bf16 bf16"), (128256, "fp32 bf16"), (131, "fp16 bf16")]
)
def test_distillation_machine_code(kernel, vocabulary, dtypes, arch):
    student, teacher = (f"*{dtype}" for dtype in dtypes.split())
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    types = dict.fromkeys(pointers, "*fp32") | {"rows": "i32", "keep_ptr": "*u8"}
    types |= dict(student_ptr=student, teacher_ptr=teacher, grad_ptr=student)
    chunk = min(triton.next_power_of_2(vocabulary), 4096)
    constants = dict(SIZE=vocabulary, CHUNK=chunk, ROWS=4096 // chunk)
    types = {name: type for name, type in types.items() if name in kernel.arg_names}
    code = triton_loops.compile_case(triton_loops.Case("", kernel, types, constants, distill.WARPS, 3), arch)
    assert code.stack == 0 and not {"LDL", "STL"} & code.opcodes
    assert not re.search(r"(div|rcp)\.(full|approx)", code.ptx)
    if vocabulary % 16 == 0:
        # Three blocks a multiprocessor: one's loads run while another one's reductions wait.
        assert code.registers <= 80
        wide = [i.opcode for i in code.body if i.opcode.startswith(("LDG.E.128", "STG.E.128"))]
        assert len(wide) >= 4


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim,kind", triton_loops.ATTENTION)
def test_attention_machine_code(arch, head_dim, kind):
    case = triton_loops.attention_case(head_dim, kind, arch)
    code = triton_loops.compile_case(case, arch)
    assert code.stack == 0 and not {"LDL", "STL"} & code.opcodes
    assert triton_loops.tensor_cores(case, arch) & code.opcodes
    assert "LDGSTS" in code.opcodes  # loads run ahead of the products
    assert code.shared <= (99 << 10 if arch == 80 else 227 << 10)
    assert triton_loops.breaches(triton_loops.examine(case, arch, code), case) == []


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", triton_loops.HEAD_DIMS)
def test_decoding_machine_code(arch, head_dim):
    code = triton_loops.compile_case(triton_loops.decode_case(head_dim), arch)
    assert code.stack == 0 and not {"LDL", "STL"} & code.opcodes
    # Codes become floats by prmt; the division that tells whose head it is converts two numbers.
    assert sum(i.opcode.startswith("I2F") for i in code.body) <= 2
    assert any(i.opcode.startswith("STG.E.128") for i in code.body)


def assert_packs_lie_in_rows(ttgir: str) -> None:
    """`look_up_levels` takes one word of levels for four bytes, so the layout must keep those in a row."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    used = re.findall(r"prmt\.b32.*?: tensor<\d+x\d+xi8, (#\w+)>", ttgir)
    assert used
    for layout in (layouts[name] for name in used):
        if "#ttg.blocked" in layout:
            assert re.search(r"sizePerThread = \[\d+, (4|8|16|32)\].*order = \[1, 0\]", layout), layout
        else:
            assert re.search(r"#ttg.linear<\{register = \[\[0, \d+\], \[0, \d+\]", layout), layout


@pytest.fixture
def a_target(monkeypatch):
    """Something that says which GPU to compile for, all that torch asks the driver while it traces."""
    if not torch.cuda.is_available():
        driver = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)


def pasted(kernel) -> str:
    """The source of a kernel after inductor has put it, with what it reads, into a string in its own code."""
    from torch._inductor.codegen import wrapper

    write = getattr(wrapper, "user_defined_triton_kernel_transitive_closure_source_code", None)
    if write is None:
        pytest.skip("this torch has another name for it")
    found = {}
    exec(f"source = '''\n{write(kernel)}\n'''", found)
    return found["source"]


MODULES = attention, distill, fake_quant, gemm, ldp
KERNELS = [value for module in MODULES for name, value in vars(module).items()
           if name.endswith("_kernel") and hasattr(value, "arg_names")]  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_torch_compile_can_paste_kernels(kernel):
    functions = [node.name for node in ast.parse(pasted(kernel)).body if isinstance(node, ast.FunctionDef)]
    assert kernel.__name__ in functions


def test_assembly_of_several_lines_could_not_be_pasted(monkeypatch):
    monkeypatch.setattr(language, "_NIBBLES", triton.language.constexpr("shl.b32 $0, $2, 4;\nmov"))
    with pytest.raises(SyntaxError, match="unterminated string"):
        compile(pasted(gemm.gemm_a4_kernel), "pasted", "exec")


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gemm_traces_into_one_graph_that_writes_its_result_only(a_target, bits, dynamic):
    op, words = getattr(torch.ops.w2a4, f"gemm_w{bits}a4"), torch.zeros(8, 2, 4, dtype=torch.int8)
    codes, weight = torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(8, 8 * bits, dtype=torch.uint8)
    args = [codes, torch.ones(3, 1), weight, *[words] * (bits == 2), torch.ones(8, 2).half(), None]
    assert_traces(lambda *args: op(*args, 32, torch.float32) + 1, args, dynamic, (3, 8), 1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_traces_into_one_graph_that_writes_its_result_only(a_target, dynamic):
    codes, params = torch.zeros(1, 2, 99, 16, dtype=torch.uint8), torch.zeros(1, 2, 99, 2).half()

    def call(q, *kv):
        op = torch.ops.w2a4.attention_kv4_prefill
        return op(q, *kv, q.shape[2] + 5, None, True, 0.1) + 1

    args = torch.zeros(1, 4, 70, 32).half(), codes, params, codes.clone(), params.clone()
    assert_traces(call, args, dynamic, (1, 70, 4, 32), 2)


def test_distillation_traces_into_one_graph_that_writes_its_result_only(a_target):
    rows, grad = torch.ops.w2a4.divergence_rows, torch.ops.w2a4.divergence_grad
    logits, keep = torch.zeros(3, 131).half(), torch.ones(3, dtype=torch.bool)

    def call(student, teacher, keep, b):
        return grad(student, teacher, rows(student, teacher, keep), keep.float(), b) + 1

    assert_traces(call, (logits, logits.clone(), keep, torch.tensor(0.5)), False, (3, 131), 2)


def assert_traces(function, args, dynamic, shape, kernels):
    """torch.compile sees through an op to its kernels, and that these leave the op's inputs alone."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *inputs: [torch.zeros(shape) for _ in graph.graph.output_node().args[0]]

    torch._dynamo.reset()
    through_aot = aot_autograd(fw_compiler=backend)
    torch.compile(function, backend=through_aot, fullgraph=True, dynamic=dynamic)(*args)
    names = [str(node.target) for node in graphs[0].graph.nodes]
    assert names.count("triton_kernel_wrapper_functional") == kernels
    assert not any("w2a4" in name for name in names)
    outputs = graphs[0].graph.output_node().args[0]
    assert len(outputs) == 1, "a kernel is taken to change its inputs"


class Named(TorchDispatchMode):
    """Keeps the names of our ops that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names += [str(op).split(".")[1]] if "w2a4" in str(op) else []
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [True, False])
def test_ops_choose_by_the_number_of_tokens_on_a_device_that_is_not_there(compiled, monkeypatch):
    monkeypatch.setattr(dispatch, "backend", "auto")
    monkeypatch.setattr(dispatch, "_no_triton", {0: ""})
    monkeypatch.setattr(ops, "_cuda", True if compiled else None)

    def empty(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="cuda:0")

    with FakeTensorMode(), Named() as ran:
        weight, scale = empty(8, 32, dtype=torch.uint8), empty(8, 1, dtype=torch.float16)
        levels = empty(8, 1, 4, dtype=torch.int8)
        for tokens in (1, 16, 17):
            a = empty(tokens, 64, dtype=torch.uint8), empty(tokens, 1, dtype=torch.float32)
            y = ops.linear_w2a4(*a, weight, levels, scale, None, 128, torch.bfloat16)
            assert (y.device.type, y.shape) == ("cuda", (tokens, 8))
        clip = empty(1, dtype=torch.float32)
        quantizers.fake_quant_a4(empty(3, 64, dtype=torch.bfloat16), clip, 32)
    few = "linear_w2a4" if compiled else "gemm_w2a4"
    assert ran.names == [few, few, "gemm_w2a4", "fake_quant_rows"]


def a_loop(**changes) -> tuple[triton_loops.Loop, triton_loops.Case]:
    """A loop with the counts of the newest triton that has any, but for these changes."""
    case = triton_loops.gemm_case(2, 128, TILES[-1])
    instructions, barriers, blocks = triton_loops.COUNTS["3.9.0"][case.name][1]
    loop = triton_loops.Loop(case.name, 90, instructions, barriers, 128, {"IGMMA": 4}, {}, 0, 196, blocks)
    return replace(loop, **changes), case


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"instructions": 300}, "takes 300 instructions a step, 286 before"),
        ({"barriers": 6}, "has 6 barriers a step, 5 before"),
        ({"blocks": 0}, "leaves room for 0 blocks, 1 before"),
        ({"promotion": 192}, "takes 192 instructions to move 64 sums on"),
        ({"mma": {}}, "has none of ['IGMMA'] in the loop"),
        ({"mma": {"IGMMA": 4, "HMMA": 2}}, "has ['HMMA', 'IGMMA'] in the loop, expected ['IGMMA']"),
        ({"slow": {"I2F": 2}}, "has I2F in the loop"),
        ({"slow": {"MUFU": 1}}, "has MUFU in the loop"),
        ({"local": 2}, "accesses local memory 2 times in the loop"),
    ],
)
def test_a_worse_loop_is_found(changes, message):
    assert triton_loops.breaches(*a_loop(), "3.9.0") == []
    assert triton_loops.breaches(*a_loop(**changes), "3.9.0") == [message]


def test_the_counts_of_another_triton_are_a_loose_bound():
    assert triton_loops.breaches(*a_loop(instructions=420, barriers=9), "99.0") == []
    assert len(triton_loops.breaches(*a_loop(instructions=700, barriers=20, mma={}), "99.0")) == 3
    assert {name for counts in triton_loops.COUNTS.values() for name in counts} == {
        case.name for case in triton_loops.cases(90)
    }
