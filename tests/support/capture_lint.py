"""What CUDA graph capture would refuse, or freeze, in a step that runs on the CPU.

A graph replays kernels with the arguments of its capture. So a step must not wait for what a tensor holds,
take sizes from it, or copy between host and device (`CaptureLint`), and must find every tensor it did not
make itself where it was, and pass the same numbers, the next time (`trace`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Ops of aten by what is wrong with them.
REFUSED = {
    "waits for a number": {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"},
    "makes as much as the data say": {
        "nonzero", "nonzero_numpy", "argwhere", "masked_select", "_unique", "_unique2", "unique_dim",
        "unique_consecutive", "unique_dim_consecutive", "bincount",
    },
    "makes a tensor of host data": {"lift_fresh", "lift", "from_file"},
    "pins memory": {"_pin_memory", "pin_memory"},
}  # fmt: skip
#: Functions that never come to aten on a CPU, where there is nothing to copy.
HOST_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
HOST_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class CaptureLint(TorchDispatchMode):
    """Collects in `found` what a capture would not survive, each with the line that does it.

    `ran` are the ops of w2a4 that ran.

    `with CaptureLint() as lint: step()`
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ran: set[str] = set()
        self._functions = _HostFunctions(self.add)

    def __enter__(self) -> CaptureLint:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def add(self, what: str) -> None:
        ours = [
            f for f in traceback.extract_stack() if f.filename != __file__ and "/torch/" not in f.filename
        ]
        self.found.append(f"{what} ({ours[-1].filename}:{ours[-1].lineno})")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name.removeprefix("aten::")
        if op.namespace == "w2a4":
            self.ran.add(name.removeprefix("w2a4::"))
        for reason, ops in REFUSED.items():
            if name in ops:
                self.add(f"{name} {reason}")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in INDEXING and any(t.dtype in (torch.bool, torch.uint8) for t in _indices(args)):
            self.add(f"{name} with a mask makes as much as the data say")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.add("repeat_interleave without output_size makes as much as the data say")
        out = op(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        places = {t.device.type for t in (*tensors, *results) if t.dim() or name in ("copy_", "_to_copy")}
        if len(places) > 1:
            self.add(f"{name} copies between {' and '.join(sorted(places))}")
        return out


def _indices(args: tuple) -> list[Tensor]:
    return [t for t in args[1] if t is not None] if len(args) > 1 else []


class _HostFunctions(TorchFunctionMode):
    """Sees the calls by which Python reads a tensor or makes one of its own data."""

    def __init__(self, add: Callable[[str], None]) -> None:
        super().__init__()
        self.add = add

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in HOST_READS:
            self.add(f"{function.__name__} reads on the host")
        elif function in HOST_DATA and not isinstance(args[0] if args else None, Tensor):
            self.add(f"{function.__name__} makes a tensor of host data")
        elif function is Tensor.to and any(_is_cpu(value) for value in (*args[1:], *kwargs.values())):
            self.add("to('cpu') reads on the host")
        return function(*args, **kwargs)


def _is_cpu(value: Any) -> bool:
    return isinstance(value, str) and value == "cpu"


class Trace(TorchDispatchMode):
    """Ops in their order, as a graph would keep them, in `ops`.

    Each has its numbers, and of its tensors shape, strides and the address, if they were there before; of one
    that the step made, which result it was. `read` are the storages that were there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple] = []
        self.read: dict[int, tuple[str, StorageWeakRef]] = {}
        self._made: dict[int, tuple[int, Tensor]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op)
        arguments = tuple(self._describe(name, leaf) for leaf in tree_leaves((args, kwargs or {})))
        out = op(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.numel() and _address(leaf) not in self.read:
                # Kept, so that no address comes twice.
                self._made.setdefault(_address(leaf), (len(self.ops), leaf))
        self.ops.append((name, arguments))
        return out

    def forget(self) -> None:
        """Let go of what the step made."""
        self._made.clear()

    def _describe(self, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else str(leaf)
        view = tuple(leaf.shape), leaf.stride(), leaf.storage_offset()
        address = _address(leaf)
        if address in self._made:
            return "made by", self._made[address][0], view
        if leaf.numel():
            self.read.setdefault(address, (name, StorageWeakRef(leaf.untyped_storage())))
        return address if leaf.numel() else 0, view


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def trace(step: Callable[[], Any]) -> Trace:
    """What a step does."""
    with Trace() as found:
        step()
    return found


def differences(first: Trace, second: Trace) -> Iterator[str]:
    """What a replay of the first would do otherwise than the second did."""
    if len(first.ops) != len(second.ops):
        yield f"{len(first.ops)} ops, then {len(second.ops)}"
    for (name, before), (other, after) in zip(first.ops, second.ops, strict=False):
        if name != other:
            yield f"{name}, then {other}"
            return  # nothing behind it compares
        for n, (a, b) in enumerate(zip(before, after, strict=False)):
            if a != b:
                yield f"argument {n} of {name} is {a}, then {b}"
