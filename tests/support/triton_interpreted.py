"""Run by test_triton_interpreter.py with TRITON_INTERPRET=1: the Triton kernels against the reference."""

import operator
from types import SimpleNamespace

import click
import pytest
import torch
from w2a4.triton_kernels import gemm, gemm_int8, language, tiles

from benchmarks import bench_gemm
from benchmarks.shapes import LinearShape
from support import gemm_oracle
from support.numerics import UNIT, assert_close
from support.op_arguments import FLOATS, linear_inputs, replaced
from w2a4 import ops
from w2a4.errors import BackendError
from w2a4.ops import dispatch, reference

pytestmark = pytest.mark.usefixtures("on_triton")


def both(bits, args, dtype=torch.float32):
    got = getattr(torch.ops.w2a4, f"gemm_w{bits}a4")(*args, dtype)
    return got, gemm_oracle.gemm(bits, args, dtype)


# gemm: bit for bit


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group,act_group", [(64, -1), (-1, -1), (32, 64)])
def test_the_oracle_is_the_reference_but_for_rounding(bits, group, act_group):
    args = linear_inputs(bits, 9, 70, 384, group, act_group, torch.float32)
    want = getattr(reference, f"linear_w{bits}a4")(*args, torch.float32)
    # Every one of 12 blocks at most rounds its product twice and the sum once.
    magnitude = want.abs().max() + args[1].max() * 384 * 8 * 128
    assert_close(gemm_oracle.gemm(bits, args), want, atol=float(40 * UNIT * magnitude))
    if act_group != -1:
        assert_close(gemm_oracle.gemm(bits, args), want)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 65, (2, 3), ()])
@pytest.mark.parametrize("group,act_group", [(64, -1), (32, 64), (64, 32), (128, 384), (384, 128)])
def test_gemm(bits, tokens, group, act_group):
    assert_close(*both(bits, linear_inputs(bits, tokens, 70, 384, group, act_group)))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "out,features,group,act_group",
    [(1, 96, -1, -1), (65, 288, -1, -1), (7, 288, 96, -1), (9, 288, 96, 288), (130, 1024, 256, -1),
     (0, 64, 32, -1), (3, 32, 32, 32), (33, 1536, 512, 1536), (5, 1152, 1152, 384)],
)  # fmt: skip
def test_gemm_of_odd_shapes(bits, out, features, group, act_group):
    assert_close(*both(bits, linear_inputs(bits, 5, out, features, group, act_group)))


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16, torch.bfloat16])
def test_gemm_dtypes_and_bias(bits, dtype, bias):
    args = linear_inputs(bits, 3, 37, 64, 32, bias=bias)
    got, want = both(bits, args, dtype)
    if dtype == torch.bfloat16:
        # The interpreter cuts off what bfloat16 does not hold, GPUs round.
        want = (both(bits, args)[1].view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert_close(got, want)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tile", tiles.TILES)
@pytest.mark.parametrize("group,act_group", [(32, -1), (128, -1), (-1, -1), (64, 128)])
def test_gemm_does_not_depend_on_the_tile(bits, tile, group, act_group):
    with tiles.only(tile):
        assert_close(*both(bits, linear_inputs(bits, 66, 67, 384, group, act_group, torch.float32)))


@pytest.fixture
def decoded(monkeypatch):
    """Shapes of the decoded activations of every launch from now on."""
    calls, part = [], gemm_int8._part
    monkeypatch.setattr(gemm_int8, "_part", lambda *args: calls.append(args[2].shape) or part(*args))
    return calls


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tile", tiles.INT8_TILES)
@pytest.mark.parametrize(
    "tokens,out,features,group,bias",
    [(1, 8, 128, -1, None), (257, 136, 384, 128, torch.float32), ((3, 50), 72, 256, -1, torch.float16)],
)
def test_gemm_on_decoded_codes_gives_the_same_bits(bits, tile, tokens, out, features, group, bias, decoded):
    args = linear_inputs(bits, tokens, out, features, group, bias=bias)
    with tiles.only(tile):
        assert_close(*both(bits, args))
        assert_close(*both(bits, args, torch.float16))
    assert len(decoded) == 2


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tile", tiles.INT8_TILES)
@pytest.mark.parametrize(
    "tokens,out,features,group,act_group,bias",
    [(1, 8, 256, 128, 128, None), (259, 136, 512, 128, 256, torch.float32), ((3, 51), 72, 384, -1, 128, None),
     (131, 72, 512, 256, 128, torch.float16)],
)  # fmt: skip
def test_gemm_on_decoded_codes_with_several_scales_a_token(
    bits, tile, tokens, out, features, group, act_group, bias, decoded
):
    args = linear_inputs(bits, tokens, out, features, group, act_group, bias=bias)
    with tiles.only(tile):
        got, want = both(bits, args)
    assert_close(got, want)
    assert_close(got, getattr(reference, f"linear_w{bits}a4")(*args, torch.float32))
    assert len(decoded) == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_gemm_decodes_in_parts_what_takes_too_much_memory(bits, decoded, monkeypatch):
    monkeypatch.setattr(gemm_int8, "MOST_BYTES", 128 * 256)
    for act_group in (-1, 128):
        args = linear_inputs(bits, 130, 264, 256, 128, act_group, bias=torch.float32)
        with tiles.only(tiles.INT8_TILES[1]):
            assert_close(*both(bits, args))
    assert [len_ for len_, _ in decoded] == [128, 2] * 6


@pytest.mark.parametrize("out,features,group,act_group", [
    (12, 128, 128, -1), (8, 192, -1, -1), (8, 256, 64, -1), (8, 512, 256, -1), (8, 512, -1, 256),
    (8, 256, 128, 64),
])  # fmt: skip
def test_gemm_of_other_shapes_decodes_in_the_loop(out, features, group, act_group, decoded):
    with tiles.only(*tiles.INT8_TILES):
        assert_close(*both(4, linear_inputs(4, 5, out, features, group, act_group)))
    assert not decoded


def test_gemm_integer_sums_of_decoded_codes_are_exact_up_to_the_largest_block():
    features = gemm.MAX_BLOCK // 128 * 128
    a_codes = torch.full((1, features // 2), 0x88, dtype=torch.uint8)
    weight = torch.full((8, features // 2), 0x88, dtype=torch.uint8)
    args = a_codes, torch.ones(1, 1), weight, torch.ones(8, 1).half(), None, features
    with tiles.only(tiles.INT8_TILES[0]):
        got, want = both(4, args)
    assert_close(got, want)
    assert got[0, 0] == features * 64


@pytest.mark.parametrize("bits", [2, 4])
def test_gemm_integer_sums_are_exact_up_to_the_largest_block(bits):
    # 131040 products of 128 * 128, the largest a kernel meets, come within a millesimal of 2**31.
    features = gemm.MAX_BLOCK // 32 * 32
    a_codes = torch.full((2, features // 2), 0x88, dtype=torch.uint8)
    weight = torch.full((2, features * bits // 8), 0x88 if bits == 4 else 0, dtype=torch.uint8)
    levels = [torch.tensor([-128, 1, 2, 3], dtype=torch.int8).expand(2, 1, 4).contiguous()] * (bits == 2)
    args = a_codes, torch.ones(2, 1), weight, *levels, torch.ones(2, 1).half(), None, features
    got, want = both(bits, args)
    assert_close(got, want)
    assert got[0, 0] == features * 8 * (128 if bits == 2 else 8)


@pytest.mark.parametrize("bits", [2, 4])
def test_gemm_shows_nan_in_its_token_only(bits):
    a_codes, a_scale, *rest = linear_inputs(bits, 3, 5, 64, 32)
    a_scale[1] = float("nan")
    got, want = both(bits, (a_codes, a_scale, *rest))
    assert_close(got, want)
    assert got[1].isnan().all() and not got[0].isnan().any()


def bad_gemms():
    good = [*linear_inputs(2, 3, 8, 64, 32), torch.float32]
    names = ["a_codes", "a_scale", "weight", "levels", "scale"]
    for i, wrong in enumerate([torch.int8, torch.float16, torch.int8, torch.uint8, torch.float32]):
        yield replaced(good, i, good[i].to(wrong)), f"{names[i]} has dtype {wrong}"
    for i in (0, 2, 3):
        yield replaced(good, i, good[i][:, :-1]), f"{names[i]} has shape"
        yield (
            replaced(good, i, torch.stack([good[i]] * 2, -1)[..., 0]),
            f"{names[i]} of shape.*not contiguous",
        )
    yield replaced(good, 1, good[1][:2]), r"a_codes has shape \[3, 32\], expected \[2, 32\]"
    yield replaced(good, 5, torch.randn(7)), r"bias has shape \[7\], expected \[8\]"
    yield replaced(good, 6, 0), "group_size=0"
    yield replaced(good, 7, torch.float64), "out_dtype is torch.float64"

    mixed = [*linear_inputs(2, 3, 8, 96, 32, 48), torch.float32]
    yield mixed, "group_size=32 and the activation group 48"
    yield [*linear_inputs(2, 3, 8, 96, 48), torch.float32], "multiples of 32; linear_w2a4 takes any"
    long = [*linear_inputs(2, 1, 1, 131072, -1), torch.float32]
    yield long, "group_size=131072 .*: a 32-bit sum holds 131071 products"


@pytest.mark.parametrize("args,message", list(bad_gemms()))
def test_gemm_bad_argument(args, message):
    with pytest.raises(RuntimeError, match=message) as error:
        torch.ops.w2a4.gemm_w2a4(*args)
    assert "w2a4.gemm_w2a4" in str(error.value)


@pytest.mark.parametrize("bits", [2, 4])
def test_gemm_devices_must_agree(bits):
    args = [*linear_inputs(bits, 3, 8, 64, 32), torch.float32]
    with pytest.raises(RuntimeError, match="weight is on meta, expected cpu"):
        getattr(torch.ops.w2a4, f"gemm_w{bits}a4")(*replaced(args, 2, args[2].to("meta")))


@pytest.mark.parametrize("bits", [2, 4])
def test_gemm_opcheck(bits):
    args = (*linear_inputs(bits, (2, 3), 8, 64, 32, bias=torch.float32), torch.bfloat16)
    op = getattr(torch.ops.w2a4, f"gemm_w{bits}a4").default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("bits", [2, 4])
def test_gemm_is_one_node_of_a_compiled_graph(bits):
    args = (*linear_inputs(bits, 3, 8, 64, 32), torch.float32)
    op, graphs = getattr(torch.ops.w2a4, f"gemm_w{bits}a4"), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *args: op(*args) + 1, backend=backend, fullgraph=True)
    assert_close(compiled(*args), both(bits, args[:-1])[1] + 1)
    assert [node.op for node in graphs[0].graph.nodes].count("call_function") == 2


# the same through `ops`, as W2A4_BACKEND=triton chooses


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tokens", [1, 20, (2, 3)])
@pytest.mark.parametrize("group,act_group", [(64, -1), (32, 64)])
def test_ops_give_what_the_cpu_kernels_give(bits, tokens, group, act_group, monkeypatch):
    args = (*linear_inputs(bits, tokens, 70, 384, group, act_group, bias=torch.float16), torch.float16)
    calls, run = [], gemm._gemm
    monkeypatch.setattr(gemm, "_gemm", lambda *a: calls.append(a[0]) or run(*a))
    op = getattr(ops, f"linear_w{bits}a4")
    assert dispatch.backend == "triton"
    got = op(*args)
    assert calls == [f"gemm_w{bits}a4"]
    monkeypatch.setattr(dispatch, "backend", "auto")
    # With one scale a token they round at other places, which few results show in float16.
    one_scale = act_group == -1
    want = op(*args)
    assert_close(got, want, rtol=one_scale * 2.0**-10, atol=one_scale * 1e-5 * float(want.abs().max()))
    assert float((got == want).float().mean()) > 0.99
    assert len(calls) == 1


@pytest.mark.parametrize("bits", [2, 4])
def test_ops_on_triton_compile_into_one_graph(bits):
    args = (*linear_inputs(bits, 20, 8, 64, 32), torch.float32)
    op = getattr(ops, f"linear_w{bits}a4")
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: op(*args) + 1, backend="aot_eager", fullgraph=True)
    assert_close(compiled(*args), op(*args) + 1)


def test_ops_say_what_triton_does_not_take():
    args = linear_inputs(2, 3, 8, 96, 48)
    with pytest.raises(BackendError, match="groups of 48 inputs, it takes multiples of 32"):
        ops.linear_w2a4(*args, torch.float32)


# language: the assembly that the interpreter does not run


def run_asm(text, outputs, *inputs):
    """The registers $0, $1, ... after the few instructions that the kernels use, on Python integers."""
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name):
        return registers[name] if name in registers else int(name, 0)

    for line in text.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, rest = line.split(maxsplit=1)
        to, *sources = (part.strip() for part in rest.split(","))
        a, b, *more = [*(value(source) for source in sources), 0][: max(2, len(sources))]
        if name == "prmt.b32":
            both = (b << 32 | a).to_bytes(8, "little")
            nibbles = [more[0] >> 4 * i & 15 for i in range(4)]
            assert max(nibbles) < 8
            registers[to] = int.from_bytes(bytes(both[n] for n in nibbles), "little")
        elif name.startswith("fma.rn."):
            dtype = torch.bfloat16 if name.endswith(".bf16x2") else torch.float16
            x, y, z = (torch.frombuffer(bytearray(v.to_bytes(4, "little")), dtype=dtype).double()
                       for v in (a, b, *more))  # fmt: skip
            bits = (x * y + z).to(dtype).view(torch.int16).numpy().tobytes()
            registers[to] = int.from_bytes(bits, "little")
        else:
            operation = {
                "and.b32": operator.and_, "shl.b32": operator.lshift, "shr.u32": operator.rshift,
                "mov.b32": operator.or_,
            }[name]  # fmt: skip
            registers[to] = operation(a, b) & 0xFFFFFFFF
    return [registers[f"${i}"].to_bytes(4, "little") for i in range(outputs)]


def words(*shape):
    return torch.randint(0, 256, (*shape, 4), dtype=torch.uint8)


def signed(data):
    return torch.frombuffer(bytearray(data), dtype=torch.int8)


def test_nibbles_in_assembly():
    for word in words(50):
        even, odd = run_asm(language._NIBBLES.value, 2, int.from_bytes(bytes(word.tolist()), "little"))
        codes = reference.unpack(word, 4, 8, signed=True)
        assert_close(signed(even), codes[0::2] * 16)
        assert_close(signed(odd), codes[1::2] * 16)


def test_levels_in_assembly():
    for word, levels in zip(words(50), words(50), strict=True):
        integers = (int.from_bytes(bytes(t.tolist()), "little") for t in (word, levels))
        out = run_asm(language._LEVELS.value, 4, *integers)
        want = levels.view(torch.int8)[reference.unpack(word, 2, 16).long()]
        assert_close(signed(out[0] + out[1]), want[0::2])
        assert_close(signed(out[2] + out[3]), want[1::2])


# tiles


def test_rule_fits_the_tokens():
    problems = [
        tiles.Problem(2, t, n, 4096, 128, 4096) for t in (1, 16, 17, 100, 2048) for n in (64, 4096, 28672)
    ]
    chosen = [tiles.rule(problem) for problem in problems]
    assert all(tile in tiles.TILES for tile in chosen)
    assert [t.m for t in chosen[:3]] == [16, 16, 16] and chosen[-1] == tiles.TILES[-1]
    of_hopper = [tiles.rule(problem, int8=True) for problem in problems]
    assert of_hopper[:-3] == chosen[:-3]
    assert of_hopper[-3:] == [tiles.INT8_TILES[0], tiles.INT8_TILES[-1], tiles.INT8_TILES[-1]]


def test_tiles_of_decoded_codes_serve_long_prompts_on_hopper(a_gpu, monkeypatch):
    problem, codes = tiles.Problem(2, 2048, 4096, 4096, 128, 4096), torch.empty(1)

    def chosen(codes=codes, **changes):
        return tiles.choose_tile(problem._replace(**changes), codes, None).int8

    assert not chosen()
    monkeypatch.setattr(tiles, "_is_hopper", lambda device: True)
    assert chosen() and chosen(group=4096) and chosen(tokens=1024)
    assert chosen(act_group=128) and chosen(act_group=256) and chosen(group=4096, act_group=128)
    assert not (chosen(tokens=1023) or chosen(group=64) or chosen(out_features=4100))
    assert not (chosen(act_group=64) or chosen(group=4096, act_group=256))
    assert not chosen(torch.nn.Parameter(codes)), "a tensor that is not a plain one, as while tracing"
    assert tiles.serving(problem._replace(tokens=512), codes) == tiles.TILES + tiles.INT8_TILES


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """What choosing asks of a GPU, and a clock by which tiles of 64 tokens are the fastest."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiles, "_measured", {})
    monkeypatch.setattr(tiles, "_is_hopper", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU, really")
    monkeypatch.setattr(tiles, "INTERPRET", SimpleNamespace(value=False))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tiles.triton.testing, "do_bench_cudagraph", lambda run: run())
    yield lambda tile: abs(tile.m - 64) + tile.n / 1000
    tiles.autotune(False)


def test_autotune_measures_once_and_remembers(a_gpu, monkeypatch):
    problem, codes = tiles.Problem(2, 900, 4096, 4096, 128, 4096), torch.empty(1)
    assert tiles.choose_tile(problem, codes, a_gpu) == tiles.rule(problem)
    tiles.autotune(True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tiles.choose_tile(problem, codes, a_gpu) == tiles.rule(problem)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    best = tiles.Tile(64, 64, 128, 4, 4)
    assert tiles.choose_tile(problem, codes, a_gpu) == best
    tiles.autotune(False)
    tiles._measured.clear()  # as in another process
    assert tiles.choose_tile(problem._replace(tokens=1000), codes, None) == best
    assert tiles.choose_tile(problem._replace(tokens=2000), codes, None).m == 128


def test_only_some_tiles_are_chosen_measured_and_kept(a_gpu):
    problem, codes = tiles.Problem(2, 900, 4096, 4096, 128, 4096), torch.empty(1)
    small, large = tiles.TILES[0], tiles.fit_k(tiles.TILES[-1], 128)
    with tiles.only(small):
        assert tiles.choose_tile(problem, codes, None) == tiles.fit_k(small, 128)
    tiles.autotune(True)
    with tiles.only(small, tiles.TILES[-1]):
        assert tiles.choose_tile(problem, codes, a_gpu) == tiles.fit_k(small, 128)
    tiles.autotune(False)
    assert tiles.choose_tile(problem, codes, None) == tiles.fit_k(small, 128)
    with tiles.only(*tiles.TILES[-2:]):  # what was kept before turns out to be wrong
        assert tiles.choose_tile(problem, codes, None) == large


def test_tuning_checks_every_tile_and_keeps_none_that_is_wrong(a_gpu, monkeypatch, capsys):
    shape, bad = LinearShape(40, 128), tiles.TILES[2]  # the one that the clock likes best is wrong

    def fastest(key, candidates, run):
        return tiles.fit_k(next(tile for tile in tiles._allowed if tile.m == 64), 64)

    monkeypatch.setattr(tiles, "_measure", fastest)
    run = gemm._gemm
    monkeypatch.setattr(gemm, "_gemm", lambda *args: run(*args) + (tiles._allowed == (bad,)))
    # Two scales a token: a result on a CPU must have the bits of the reference.
    a_codes, a_scale, *tensors, _, _ = linear_inputs(4, 70, 40, 128, 128, 64)
    args = "linear_w4a4", shape, a_codes, a_scale, tuple(tensors), torch.float32
    assert bench_gemm.tune_tiles(*args) == [bad]
    (chosen,) = tiles._measured.values()
    assert chosen == tiles.fit_k(tiles.TILES[3], 64) and not tiles._measuring
    assert "gemm_w4a4 40x128, 70 tokens: WRONG results with Tile(m=64, n=64" in capsys.readouterr().err
    monkeypatch.setattr(gemm, "_gemm", lambda *args: run(*args) + 1)
    with pytest.raises(click.ClickException, match="every tile gives wrong results"):
        bench_gemm.tune_tiles(*args)


def test_tuning_passes_over_a_tile_that_fails_and_says_what_the_others_took(a_gpu, monkeypatch, capsys):
    bad, run = tiles.TILES[-1], gemm._gemm

    def failing(*args):
        if tiles._allowed == (bad,):
            raise ValueError("no descriptor")
        return run(*args)

    monkeypatch.setattr(gemm, "_gemm", failing)
    monkeypatch.setattr(tiles.triton.testing, "do_bench_cudagraph", lambda run: run() or 0.5)
    a_codes, a_scale, *tensors, _, _ = linear_inputs(4, 3, 40, 128, 128, 64)
    args = LinearShape(40, 128), a_codes, a_scale, tuple(tensors), torch.float32
    assert bench_gemm.tune_tiles("linear_w4a4", *args) == [bad]
    said = capsys.readouterr().err
    assert "Tile(m=128, n=128, k=128, warps=8, stages=3, int8=0) fails, ValueError: no descriptor" in said
    assert said.count("3 tokens: 500.0 us with Tile(") == len(tiles.TILES) - 1


def test_autotune_passes_over_tiles_that_do_not_fit(a_gpu):
    def run(tile):
        if tile.m < 128:
            raise tiles.OutOfResources(1, 0, "shared memory")
        return a_gpu(tile)

    tiles.autotune(True)
    assert tiles.choose_tile(tiles.Problem(4, 9, 64, 64, 64, 64), torch.empty(1), run).m == 128
