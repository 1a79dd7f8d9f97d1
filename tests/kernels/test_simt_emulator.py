"""What csrc/simt finds wrong in a kernel, on small kernels with a mistake each; and rules of the kernels'
source that it relies on."""

import re

import pytest

from support import simt

pytest.importorskip("pybind11")

#: Kernels of bind_planted.cpp that go wrong in another way than by a race, and what is said of it.
OTHERS = {
    "a typed access off its alignment": "an access of 4 bytes that is not aligned",
    "the read-only path to what the grid wrote": "a read through the read-only path of what the same grid",
    "the same shuffle": "lanes of one warp meet at shfl_xor {0} and shfl_xor {1}",
    "a helper called from two places": "lanes of one warp meet at shfl_xor {0} and shfl_xor {1}",
    "the same barrier": "lanes of one block meet at sync_block {0} and sync_block {1}",
}
SOURCE = (simt.ROOT / "csrc/simt/bind_planted.cpp").read_text()
PLANTED = re.findall(r'^    {"(.*)",$', SOURCE, re.M)
#: Every twin of an instruction that needs an alignment, of so many bytes.
ALIGNED = [(name, int(bytes)) for name, bytes in re.findall(r'^    {"(.*)", (\d+),', SOURCE, re.M)]


def lines_of(name):
    """Numbers of the lines of a planted kernel."""
    start = SOURCE[: SOURCE.index(f'{{"{name}",')].count("\n") + 1
    return range(start, start + SOURCE.splitlines()[start:].index("     }},") + 1)


def run(name, right):
    """What is wrong with a planted kernel, by seed; None where nothing is."""
    found = []
    for seed in range(5):
        try:
            simt.load(simt.build("races")).planted(name, right, seed)
            found.append(None)
        except RuntimeError as error:
            found.append(str(error))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not simt.CAN_WATCH, reason="races.cpp needs Linux")
@pytest.mark.parametrize("name", PLANTED)
def test_planted(name):
    """The mistake is found in any order of lanes and blocks, and where it stands; nothing else is."""
    assert run(name, True) == [None] * 5
    for message in run(name, False):
        named = [int(n) for n in re.findall(r"bind_planted\.cpp:(\d+)", message)]
        if name not in OTHERS:
            assert re.search(
                r"race: an? (read|write|atomic change) of (byte \d+ of shared|global) mem", message
            )
            assert re.search(r"which thread \d+ of block \d+ .* no barrier ordered, thread \d+ of", message)
            assert len([n for n in named if n in lines_of(name)]) >= 2
        else:
            first, second = re.findall(r"\(bind_planted\.cpp:\d+\)", message) or ("", "")
            assert OTHERS[name].format(first, second) in message
            assert set(named) < set(lines_of(name)) and (first != second or not first)


@pytest.mark.parametrize("name,bytes", ALIGNED)
def test_alignment(name, bytes):
    module = simt.load()
    module.aligned_access(name, 0)
    for offset in {1, bytes // 2, bytes - 1}:
        with pytest.raises(RuntimeError, match=f"{bytes} bytes that (is|are) not aligned"):
            module.aligned_access(name, offset)


def test_every_twin_that_needs_an_alignment_is_tested():
    source = (simt.ROOT / "csrc/cuda/ptx.cuh").read_text() + (simt.ROOT / "csrc/cuda/ptx_mma.cuh").read_text()
    takes_pointer = re.findall(
        r"^W2A4_DEVICE \w+ (\w+)\([^{;]*\b(?:void|char|uint32_t)\s?\* \w+[^{;]*{", source, re.M
    )
    tested = {name.split("'")[0] for name, _ in ALIGNED}
    assert set(takes_pointer) - {"row_of"} == tested


def test_blocks_run_interleaved_or_one_after_another():
    orders = [simt.load().steps_of_blocks(seed) for seed in range(20)]
    runs = [sum(a != b for a, b in zip(order, order[1:], strict=False)) + 1 for order in orders]
    assert all(sorted(order) == sorted(3 * list(range(6))) for order in orders)
    assert min(runs) == 6 and max(runs) > 9
    assert len({tuple(order) for order in orders}) == 20


KERNEL_SOURCES = {path: path.read_text() for path in (simt.ROOT / "csrc/cuda").glob("*.cu*")}
#: Instructions of which a copy may be left out, added or moved, as of any arithmetic: they concern one lane,
#: and no memory.
PURE = {
    "mad.wide",
    "cvt.f32",
    "cvt.rn",
    "lop3.b32",
    "prmt.b32",
    "dp4a.s32",
    "rcp.approx",
    "max.NaN",
    "min.NaN",
    "ex2.approx",
    "mov.u32",
}


def test_assembly_that_lanes_do_together_or_on_memory_is_volatile():
    """Or the compiler may move it to where not all lanes come."""
    statements = [
        match
        for source in KERNEL_SOURCES.values()
        for match in re.findall(r'\basm\b( volatile)?\s*\(\s*"((?:\w+\.\w+)?)', source)
    ]
    opcodes = {opcode for _, opcode in statements}
    together = {"mma.sync", "ldmatrix.sync", "redux.sync", "cp.async", "barrier.cluster"}
    together |= {"griddepcontrol.wait", "griddepcontrol.launch_dependents"}
    assert together | PURE == opcodes - {""}
    assert all(volatile or opcode in PURE for volatile, opcode in statements)
    assert len(statements) == sum(len(re.findall(r"\basm\b", source)) for source in KERNEL_SOURCES.values())


def test_a_line_has_one_meeting_of_lanes():
    """Or two different ones would look like the same place to the emulator."""
    source = "\n".join(KERNEL_SOURCES.values())
    meetings = set(re.findall(r"(\w+)\([^;{}]*W2A4_SITE(?:_ONLY)?\) {", source))
    assert {"sync_warp", "shfl_xor", "warp_max", "mma_s8_16x8x32", "ldmatrix_x4", "warp_sum"} <= meetings
    call = re.compile(rf"\b({'|'.join(meetings)})(?:<[^>]*>)?\(")
    for path, text in KERNEL_SOURCES.items():
        for line in text.splitlines():
            calls = 0 if "//" in line.split("(")[0] or "W2A4_DEVICE" in line else len(call.findall(line))
            assert calls <= 1, (path.name, line)
