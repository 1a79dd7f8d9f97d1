"""The table of ops: schema, reference, fake and kernels of each `torch.ops.w2a4.<op>`, in one place.

An entry is a function with `@op`, the reference, and one with `@fake_of` behind it. The entries stand in
files by subject (`activations`, `linear`, `kv`, `layer`, `fitting`, `training`); importing one fills `OPS`.
`library` defines the ops and loads the kernels. C++ repeats no schema: a module lists the types of its
functions, and `library` compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

#: Which extension or package brings a kernel of an op.
KERNELS = ("cpu", "cuda", "triton")


@dataclass
class Op:
    """An entry of the table.

    Attributes:
        name: that of the op, the reference, the public function in `w2a4.ops` and the C++ function.
        schema: arguments and results, as torch writes them: `(Tensor x, int n=1) -> Tensor`.
        reference: plain PyTorch, with the arguments of the schema.
        kernels: out of `KERNELS`: w2a4._C, w2a4._cuda, w2a4.triton_kernels.
        fake: shapes and dtypes without data, with the same arguments; None where Triton's module has it.
    """

    name: str
    schema: str
    reference: Callable
    kernels: tuple[str, ...]
    fake: Callable | None = None

    @property
    def is_triton_only(self) -> bool:
        """Whether `torch.library.triton_op` defines the op, when its Triton module is imported.

        torch keeps the source of the kernels of such an op for the keys of its compile caches, and takes no
        op that is defined already. Public functions of other ops, and autograd functions, call it.
        """
        return self.kernels == ("triton",)

    @property
    def signature(self) -> str:
        """Name and types, as the function of C++ has them: `name(Tensor, int) -> Tensor`."""
        arguments, _, result = re.sub(r"\([a-z]!\)", "", self.schema).rpartition(" -> ")
        types = [argument.split()[0] for argument in arguments[1:-1].split(", ")]
        return f"{self.name}({', '.join(types)}) -> {result}".replace("SymInt", "int")


OPS: dict[str, Op] = {}


def op(schema: str, kernels: str) -> Callable[[Callable], Callable]:
    """Enter an op, by its reference: `@op("(Tensor x) -> Tensor", kernels="cpu cuda")`."""

    def enter(reference: Callable) -> Callable:
        name = reference.__name__
        OPS[name] = Op(name, schema, reference, tuple(kernels.split()))
        return reference

    return enter


def fake_of(reference: Callable) -> Callable[[Callable], Callable]:
    """Enter the fake of the op that has this reference."""

    def enter(fake: Callable) -> Callable:
        OPS[reference.__name__].fake = fake
        return fake

    return enter


def one_device(**tensors: Tensor | None) -> None:
    """Refuse, in a fake, tensors that lie on several devices."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise RuntimeError(f"arguments lie on different devices: {listed}; move them to one")
