"""Models on a CUDA device that is not there: shapes, dtypes and devices of every tensor, and no data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten

#: What a step reads on the host raises one of torch's data-dependent errors by itself.
DEVICE = torch.device("cuda:0")


@contextmanager
def fake_cuda(model: nn.Module) -> Iterator[None]:
    """Moves the parameters of a model to a fake cuda:0, and makes fake whatever is made inside."""
    model.requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pass
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = mode.from_tensor(tensor.detach())
                    with mode:
                        fake = fake.to(DEVICE)
                    is_parameter = tensors is module._parameters
                    tensors[name] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    with mode, _WithoutCuda():
        yield


class _WithoutCuda(TorchFunctionMode):
    """Does what a torch without CUDA refuses to do to a fake tensor, where Python's methods set a device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__getitem__:
            return _view(*args)
        if function is Tensor.__setitem__:
            return aten.copy_(_view(args[0], args[1]), args[2])
        if function is Tensor.copy_:
            return aten.copy_(*args)
        if function is Tensor.contiguous:
            copy = aten.clone(args[0], memory_format=torch.contiguous_format)
            return args[0] if args[0].is_contiguous() else copy
        out = function(*args, **(kwargs or {}))
        if function is torch.tensor:
            out.constant = None  # or it would be computed with, on the device that is not there
        return out


def _view(x: Tensor, index: Any) -> Tensor:
    """`x[index]` by ops of aten."""
    index = index if isinstance(index, tuple) else (index,)
    dots = [n for n, part in enumerate(index) if part is Ellipsis]
    for n in dots:
        rest = x.dim() - sum(part is not None for part in index) + 1
        index = (*index[:n], *[slice(None)] * rest, *index[n + 1 :])
    dim, places = 0, []
    for part in index:
        if isinstance(part, int):
            x = x.select(dim, part)
            continue
        if part is None:
            x = x.unsqueeze(dim)
        elif isinstance(part, slice):
            x = aten.slice(x, dim, part.start, part.stop, part.step or 1)
        places.append(part if isinstance(part, Tensor) else None)
        dim += 1
    return aten.index(x, places) if any(place is not None for place in places) else x
