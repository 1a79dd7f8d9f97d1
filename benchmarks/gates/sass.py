"""Reads what nvcc and cuobjdump print: ptxas's resources, and machine code as instructions and loops."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

_FUNCTION = re.compile(r"^\s*Function : (\S+)|^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"(?:0x([0-9a-f]+)|`?\((\.L\w+)\))\s*$")
_REGISTER = re.compile(r"(?<![A-Za-z])R(\d+)")
_MMA = re.compile(r"^[BIHQ]G?MMA\b|^UTC\w*MMA\b")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `target` is the address that a branch goes to."""

    address: int
    predicate: str
    opcode: str  # with its modifiers, e.g. LDG.E.128.CONSTANT
    operands: str
    target: int | None = None

    @property
    def is_mma(self) -> bool:
        return _MMA.match(self.opcode) is not None

    @property
    def load_bytes(self) -> int:
        """Bytes a lane loads from global memory, 0 for all other instructions."""
        parts = self.opcode.split(".")
        if parts[0] not in ("LDG", "LDGSTS"):
            return 0
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((widths[part] for part in parts if part in widths), 4)


@dataclass(frozen=True)
class Resources:
    """Of a kernel, as ptxas tells them; bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


def parse_ptxas(log: str) -> dict[str, Resources]:
    """Resources by mangled name, from `nvcc -Xptxas -v`."""
    kernels = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        numbers = {
            name: int(match.group(1)) if (match := re.search(pattern, part)) else 0
            for name, pattern in (
                ("registers", r"Used (\d+) registers"),
                ("stack", r"(\d+) bytes stack frame"),
                ("spill_stores", r"(\d+) bytes spill stores"),
                ("spill_loads", r"(\d+) bytes spill loads"),
                ("shared", r"(\d+) bytes smem"),
            )
        }
        kernels[part.split("'")[0]] = Resources(**numbers)
    return kernels


def parse_sass(text: str) -> dict[str, list[Instruction]]:
    """Instructions by mangled name, from `cuobjdump --dump-sass` or `nvdisasm -c`."""
    kernels: dict[str, list[tuple]] = {}
    labels: dict[str, int] = {}
    waiting: list[str] = []
    current: list[tuple] = []
    for line in text.splitlines():
        if match := _FUNCTION.search(line):
            current = kernels.setdefault(match.group(1) or match.group(2), [])
        elif match := _LABEL.match(line):
            waiting.append(match.group(1))
        elif match := _INSTRUCTION.search(line):
            address = int(match.group(1), 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            current.append((address, match.group(2) or "", match.group(3), match.group(4).strip()))
    return {name: [_with_target(raw, labels) for raw in body] for name, body in kernels.items()}


def _with_target(raw: tuple, labels: dict[str, int]) -> Instruction:
    address, predicate, opcode, operands = raw
    jumps = opcode.startswith("BRA") or (opcode.startswith("CALL") and predicate)
    match = _TARGET.search(operands) if jumps else None
    if match is None:
        return Instruction(*raw)
    target = int(match.group(1), 16) if match.group(1) else labels.get(match.group(2))
    return Instruction(address, predicate, opcode, operands, target)


def successors(body: list[Instruction]) -> list[list[int]]:
    """Indices of the instructions that may follow each one while the lanes of a warp stay together.

    A call comes back to the next instruction. BRA.DIV goes to where a diverged warp is mended, and
    BRA.CONV past such a place. For sm_80 ptxas leaves loops by a call under a predicate.
    """
    index = {instruction.address: n for n, instruction in enumerate(body)}
    following = []
    for n, instruction in enumerate(body):
        opcode = instruction.opcode
        taken = instruction.target in index and not opcode.startswith("BRA.DIV")
        # A condition stands before the opcode, or as an operand: `BRA.U UP0, 0x160`.
        conditional = instruction.predicate or "," in instruction.operands
        ends = opcode.split(".")[0] in ("BRA", "BRX", "EXIT", "RET", "JMP")
        falls = n + 1 < len(body) and (conditional or not ends) and not opcode.startswith("BRA.CONV")
        jumps = [index[instruction.target]] if taken else []
        following.append(jumps + [n + 1] * falls)
    return following


def loops(body: list[Instruction]) -> list[list[Instruction]]:
    """The natural loops, each with the loops inside of it: code that merely lies between is left out.

    Every edge back to an instruction that dominates its origin makes a loop: what reaches the origin without
    passing that instruction, the head. Loops with the same head are one.
    """
    following = successors(body)
    before: list[list[int]] = [[] for _ in body]
    for origin, nexts in enumerate(following):
        for target in nexts:
            before[target].append(origin)
    dominators = _dominators(following, before)
    members: dict[int, set[int]] = {}
    for origin, nexts in enumerate(following):
        for head in nexts:
            if origin != head and dominators[origin] >> head & 1:
                inside = {n for n in _reaching(origin, head, before) if dominators[n]}
                members.setdefault(head, {head}).update(inside)
    return [[body[n] for n in sorted(inside)] for inside in members.values()]


def _dominators(following: list[list[int]], before: list[list[int]]) -> list[int]:
    """For each instruction, a bit for every instruction on all ways to it; 0 if it cannot be reached."""
    dominators: dict[int, int] = {0: 1}
    changed = True
    while changed:
        changed = False
        for n in range(1, len(following)):
            known = [dominators[origin] for origin in before[n] if origin in dominators]
            if known:
                bits = functools.reduce(int.__and__, known) | 1 << n
                changed |= dominators.get(n) != bits
                dominators[n] = bits
    return [dominators.get(n, 0) for n in range(len(following))]


def _reaching(origin: int, head: int, before: list[list[int]]) -> set[int]:
    inside, open_ends = {head}, [origin]
    while open_ends:
        n = open_ends.pop()
        if n not in inside:
            inside.add(n)
            open_ends += before[n]
    return inside


def main_loop(body: list[Instruction], opcode: str = "", shortest: bool = False) -> list[Instruction]:
    """The innermost loop with the most tensor-core instructions, or with the most loads if there are none.

    Innermost: no smaller loop in it has a tensor-core instruction too. Empty if the kernel has no loop.

    Args:
        opcode: which tensor-core instructions count, e.g. "BMMA"; all of them by default.
        shortest: of several with as many, as of whole tiles and of those at an edge; else the longest.
    """
    candidates = loops(body)
    with_mma = [loop for loop in candidates if _count_mma(loop, opcode)]
    inner = [
        loop for loop in with_mma
        if not any(other is not loop and len(other) < len(loop) and set(other) <= set(loop)
                   for other in with_mma)
    ]  # fmt: skip
    if inner:
        sign = -1 if shortest else 1
        return max(inner, key=lambda loop: (_count_mma(loop, opcode), sign * len(loop)))
    return max(candidates, key=lambda loop: sum(i.load_bytes for i in loop), default=[])


def _count_mma(loop: list[Instruction], opcode: str) -> int:
    return sum(i.is_mma and i.opcode.startswith(opcode) for i in loop)


def mma_count(loop: list[Instruction]) -> int:
    return _count_mma(loop, "")


def loads_in_flight(loop: list[Instruction]) -> int:
    """16-byte loads of a lane that are under way before the first of them is needed.

    Asynchronous copies: those of one committed group, times the groups that the loop's wait leaves under
    way and the one it issues. Loads to registers: those from the first one on, round the loop, up to the
    first instruction that reads any of them.
    """
    copies = [i for i in loop if i.opcode.startswith("LDGSTS") and i.load_bytes >= 16]
    if copies:
        groups = sum(i.opcode.startswith("LDGDEPBAR") for i in loop) or 1
        waits = [i for i in loop if i.opcode.startswith("DEPBAR")]
        left = [int(i.operands.rsplit("0x", 1)[1], 16) for i in waits if "0x" in i.operands]
        return len(copies) // groups * (min(left, default=0) + 1)
    loads = [n for n, i in enumerate(loop) if i.load_bytes >= 16]
    if not loads:
        return 0
    loaded: set[int] = set()
    count = 0
    for instruction in loop[loads[0] :] + loop[: loads[0]]:
        written, read = registers(instruction)
        if read & loaded:
            break
        if instruction.load_bytes >= 16:
            count += 1
            loaded |= {written[0] + n for n in range(instruction.load_bytes // 4)} if written else set()
    return count


def registers(instruction: Instruction) -> tuple[list[int], set[int]]:
    """Numbers of the registers named first, which are written, and of the others, which are read."""
    first, _, rest = instruction.operands.partition(",")
    if instruction.opcode.startswith(("ST", "RED", "BRA", "EXIT")):
        first, rest = "", instruction.operands
    written = [int(number) for number in _REGISTER.findall(first)]
    return written, {int(number) for number in _REGISTER.findall(rest)}


def side_loads(loop: list[Instruction]) -> list[Instruction]:
    """Loads from global memory that are narrower than 16 bytes."""
    return [i for i in loop if 0 < i.load_bytes < 16]


def slow_instructions(loop: list[Instruction]) -> list[str]:
    """Opcodes of divisions, calls, FP64 and conversions at a quarter of the rate or less.

    I2FP and F2FP run at full rate and may stay, and so may HADD2.F32, which widens a half.
    """
    slow = re.compile(r"^(MUFU\.RCP|CALL|D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|I2F\b|F2I\b|F2F\b|FRND\b)")
    return [i.opcode for i in loop if slow.match(i.opcode) and not (i.opcode.startswith("CALL") and i.target)]


def local_accesses(body: list[Instruction]) -> int:
    """Loads and stores of local memory: spills and arrays that are not in registers."""
    return sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in body)


def warps_per_multiprocessor(registers: int) -> int:
    """Warps that 64 K registers leave room for; a lane gets a multiple of 8, and 64 warps are the most."""
    return min(64, 65536 // (32 * -(-max(registers, 1) // 8) * 8))


def launch_breaches(text: str) -> list[str]:
    """What a CUDA source must not do: launch off the stream it is given, allocate, copy or wait."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    found = []
    for match in re.finditer(r"<<<(.*?)>>>", code, re.DOTALL):
        arguments = _split(match.group(1))
        if len(arguments) != 4 or "stream" not in arguments[3]:
            found.append(f"launch without a stream: <<<{' '.join(match.group(1).split())}>>>")
    if "cudaLaunchKernelEx" in code and not re.search(r"\.stream\s*=", code):
        found.append("cudaLaunchKernelEx without a stream")
    banned = r"\bcuda(?:Malloc|Free|DeviceSynchronize|StreamSynchronize|Memcpy(?!\w*Async))\w*"
    return found + [f"calls {name}" for name in sorted(set(re.findall(banned, code)))]


def _split(arguments: str) -> list[str]:
    """At the commas that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]
