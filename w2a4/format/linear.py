"""Drop-in layers over packed weights: W2A4Linear, W3A4Linear, W4A4Linear, W8Linear, W8Embedding.

Each holds its tensors as parameters without gradient under the names a checkpoint stores them by,
and `validate()`s them after loading. Casting a module (`.half()`, `.to(dtype)`) never touches codes,
levels or scales; only moves between devices do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError, W2A4Error
from ..ops import gradients
from ..ops.packing import pack, packed_width, unpack
from ..ops.reference import divide
from .fake_quant import fake_quant_a4, fp16_scale
from .grid import Codebook, Grid, Uniform, no_levels
from .groups import resolve_group_size
from .online import OnlineRotation
from .rtn import fit_rtn
from .weight import QuantizedWeight

#: What a backward pass through packed weights is told.
NO_GRADIENT = (
    "packed layers give no gradient to their input (requires_grad=True); call w2a4.prepare_for_adapters to "
    "train adapters on them, take gradients from the float model or from what w2a4.prepare makes of it, or "
    "compute this one under torch.no_grad()"
)


class _PackedModule(nn.Module):
    """Parameters without gradient whose dtype is part of the format."""

    #: Whether a scale may be negative; none is 0.
    _signed_scales = False

    #: Whether it gives gradients to its input, see `w2a4.prepare_for_adapters`.
    differentiable = False

    def _declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device=None) -> None:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.__dict__.setdefault("_format", {})[name] = (tuple(shape), dtype)

    def _set(self, name: str, value: Tensor) -> None:
        shape, dtype = self._format[name]
        assert tuple(value.shape) == shape, (name, tuple(value.shape), shape)
        self._parameters[name] = nn.Parameter(value.to(dtype).contiguous(), requires_grad=False)

    def _apply(self, fn, recurse: bool = True):
        before = {name: self._parameters[name].detach() for name in self._format}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._parameters[name]
            if new.dtype != old.dtype:
                new.data = old.to(new.device)  # the same parameter: others may hold it
        return self

    def validate(self, name: str) -> None:
        """Raise CheckpointError if a tensor is missing, or has a wrong shape, dtype or value."""
        for key, (shape, dtype) in self._format.items():
            value = self._parameters[key]
            if value.device.type == "meta":
                raise CheckpointError(
                    f"{name}.{key} is missing from the checkpoint; download or write it again"
                )
            if value.dtype != dtype or tuple(value.shape) != shape:
                raise CheckpointError(
                    f"{name}.{key} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}; "
                    "the checkpoint is damaged or of another model"
                )
            if key in ("scale", "act_clip"):
                signed = key == "act_clip" or self._signed_scales
                self._validate_scale(f"{name}.{key}", value, signed)

    @staticmethod
    def _validate_scale(name: str, value: Tensor, signed: bool) -> None:
        value = value.detach()
        bad = ~(torch.isfinite(value) & ((value.abs() if signed else value) > 0))
        if bool(bad.any()):
            where = tuple(int(i) for i in bad.nonzero()[0])
            raise CheckpointError(
                f"{name}{list(where)} is {float(value[where])}, but scales are finite and "
                f"{'not 0' if signed else 'positive'}; the checkpoint is damaged"
            )


class _PackedLinear(_PackedModule):
    """What W2A4Linear, W3A4Linear and W4A4Linear share. See them for arguments.

    Attributes:
        grid: what the stored codes mean.
    """

    grid: Grid

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        group_size: int | str = 128,
        *,
        act_bits: int = 4,
        act_group_size: int = -1,
        rotation: OnlineRotation | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size = resolve_group_size(in_features, group_size)
        self.act_bits, self.act_group_size = act_bits, act_group_size
        self.rotation = rotation
        groups = in_features // self.group_size
        self._declare("weight", (out_features, packed_width(in_features, self.bits)), torch.uint8, device)
        stored = {
            "levels": ((out_features, groups, self.grid.level_count), torch.int8),
            "scale": ((out_features, groups), torch.float16),
        }
        for name in self.grid.tensors:
            self._declare(name, *stored[name], device)
        if act_bits == 4:
            self._declare("act_clip", (1,), torch.float32, device)
        if bias:
            empty = torch.empty(out_features, dtype=dtype or torch.get_default_dtype(), device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        group_size: int | str = 128,
        *,
        act_bits: int = 4,
        act_clip: float = 0.9,
        act_group_size: int = -1,
        rotation: OnlineRotation | None = None,
        fitted: QuantizedWeight | None = None,
    ) -> _PackedLinear:
        """Quantise an `nn.Linear`.

        Args:
            linear: weight `[out, in]`, optional bias.
            group_size: inputs that share levels and scale; divides `in`; -1 is the whole row.
            act_bits: 4, or 16 to keep activations as they are.
            act_clip: activations are clipped at this fraction of their largest magnitude; negative, they
                use all sixteen codes, see `ops.reference.a4_scale`.
            act_group_size: activations that share a scale; -1 is the whole token.
            rotation: applied to the input first; `linear` expects rotated inputs already.
            fitted: codes from a better fit than round to nearest, or on another grid of as many bits.

        Raises:
            RecipeError: the group size does not divide.
            ValueError: `fitted` has another number of bits.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"from_linear takes an nn.Linear, not {type(linear).__name__}")
        weight = linear.weight.detach()
        fitted = (fitted or fit_rtn(weight, cls.grid, group_size)).on(cls.grid)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, fitted.group_size,
            act_bits=act_bits, act_group_size=act_group_size, rotation=rotation,
            dtype=weight.dtype, device="meta",
        )  # fmt: skip
        layer._set("weight", pack(fitted.codes, cls.grid.bits))
        for name in cls.grid.tensors:
            layer._set(name, getattr(fitted, name))
        if act_bits == 4:
            layer._set("act_clip", torch.tensor([act_clip], dtype=torch.float32, device=weight.device))
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer

    def fitted(self) -> QuantizedWeight:
        """Unpacked codes, levels and scales."""
        codes = unpack(self.weight, self.bits, self.in_features, signed=self.grid.least < 0)
        levels = self._parameters.get("levels", no_levels(self.scale))
        return QuantizedWeight(codes, self.scale, levels, self.group_size, self.grid)

    @property
    def bits(self) -> int:
        """Of a weight's code."""
        return self.grid.bits

    def dequantize(self) -> Tensor:
        """The float32 weight `[out, in]` that the codes stand for."""
        return self.fitted().dequantize()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`[..., in]` to `[..., out]`, in x's dtype; residual, of that shape and dtype, is added."""
        if self.act_bits == 16:
            x = x if self.rotation is None else self.rotation.apply(x)
            y = F.linear(x, self.dequantize().to(x.dtype), self.bias)
            return y if residual is None else y + residual
        if gradients.wanted(x):
            if self.differentiable:
                y = _ThroughPacked.apply(x, self)
            else:
                y = gradients.refuse(self.forward(x.detach()), x, NO_GRADIENT)
            return y if residual is None else y + residual
        quantize = ops.quantize_a4 if self.rotation is None else self.rotation.quantize
        codes, scale = quantize(x, self.act_clip, self.act_group_size)
        return self._linear(codes, scale, x.dtype, residual)

    def seen(self, x: Tensor) -> Tensor:
        """`[..., in]` as the weights see it: rotated and rounded to 4 bits; differentiable."""
        x = x if self.rotation is None else self.rotation.apply(x)
        return x if self.act_bits == 16 else fake_quant_a4(x, self.act_clip, self.act_group_size)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, "
            f"group_size={self.group_size}, act_bits={self.act_bits}, act_group_size={self.act_group_size}"
        )


class _ThroughPacked(torch.autograd.Function):
    """A packed linear as it computes, and the gradient to its input: that of the weights as they are rounded,
    with the rounding of activations passed straight through.
    """

    @staticmethod
    def forward(ctx, x: Tensor, linear: _PackedLinear | W8Linear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear = linear
        return linear.forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,), linear = ctx.saved_tensors, ctx.linear
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            seen = linear.seen(x)
        to_seen = (grad.float() @ linear.dequantize()).to(seen.dtype)  # unpacked for this product only
        return torch.autograd.grad(seen, x, to_seen)[0], None


class W2A4Linear(_PackedLinear):
    """`nn.Linear` with non-uniform 2-bit weights and 4-bit activations.

    A group of inputs of one output row has four int8 levels and one fp16 scale: `2 + 48 / group_size`
    bits a weight. Activations have a scale a token, or one for each `act_group_size` of its inputs.
    Checkpoint tensors: `weight` uint8 `[out, ceil(in / 4)]`, `levels` int8 `[out, G, 4]`, `scale` float16
    `[out, G]`, `act_clip` float32 `[1]`, `bias`.

    >>> layer = W2A4Linear.from_linear(nn.Linear(256, 8), group_size=128)
    >>> layer(torch.randn(3, 256)).shape
    torch.Size([3, 8])
    """

    grid = Codebook(4)

    def _linear(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        p = self._parameters  # at one token, the look-up of attributes of modules counts
        return ops.linear_w2a4(
            codes, scale, p["weight"], p["levels"], p["scale"], p["bias"], self.group_size, dtype, residual
        )


class W3A4Linear(_PackedLinear):
    """`nn.Linear` with 3-bit weights and 4-bit activations.

    As `W2A4Linear`, but `weight` is uint8 `[out, ceil(in / 4) + ceil(in / 8)]` (two planes, see `packing`)
    and `levels` int8 `[out, G, 8]`: `3 + 80 / group_size` bits a weight. A uniform grid is stored as the
    levels -4..3, in as many bytes, so that one kernel serves both.
    """

    grid = Codebook(8)

    def _linear(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        p = self._parameters
        return ops.linear_w3a4(
            codes, scale, p["weight"], p["levels"], p["scale"], p["bias"], self.group_size, dtype, residual
        )


class W4A4Linear(_PackedLinear):
    """`nn.Linear` with symmetric 4-bit weights and 4-bit activations.

    As `W2A4Linear`, but `weight` is uint8 `[out, ceil(in / 2)]` and there are no `levels`.
    """

    grid = Uniform(4)
    _signed_scales = True

    def _linear(
        self, codes: Tensor, scale: Tensor, dtype: torch.dtype, residual: Tensor | None = None
    ) -> Tensor:
        p = self._parameters
        return ops.linear_w4a4(
            codes, scale, p["weight"], p["scale"], p["bias"], self.group_size, dtype, residual
        )


PACKED_LINEARS: dict[int, type[_PackedLinear]] = {
    layer.grid.bits: layer for layer in (W2A4Linear, W3A4Linear, W4A4Linear)
}


def _fit_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit rows: int8 `[rows, columns]` and float16 `[rows]`."""
    scale = fp16_scale(divide(weight.float().abs().amax(1), 127))
    return (weight.float() / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class W8Linear(_PackedModule):
    """`nn.Linear` with 8-bit weights, one scale a row, activations untouched: for lm_head.

    `dtype` is that of its bias, and of `weight` where losses read it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._declare("weight", (out_features, in_features), torch.int8, device)
        self._declare("scale", (out_features,), torch.float16, device)
        self.dtype = dtype or torch.get_default_dtype()
        empty = torch.empty(out_features, dtype=self.dtype, device=device)
        self.bias = nn.Parameter(empty, requires_grad=False) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> W8Linear:
        dtype = linear.weight.dtype
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, dtype, device="meta")
        codes, scale = _fit_rows(linear.weight.detach())
        layer._set("weight", codes)
        layer._set("scale", scale)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def weight(self) -> Tensor:
        """The codes; of a differentiable layer the weight in `dtype`, made anew each time.

        Losses that never call a head but read its weight (TRL's, Liger's) would take codes for weights.
        """
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self.dequantize().to(self.dtype) if self.differentiable else self._parameters["weight"]

    def forward(self, x: Tensor) -> Tensor:
        if gradients.wanted(x):
            if self.differentiable:
                return _ThroughPacked.apply(x, self)
            return gradients.refuse(self.forward(x.detach()), x, NO_GRADIENT)
        return ops.linear_w8(x, self._parameters["weight"], self.scale, self.bias)

    def dequantize(self) -> Tensor:
        """The float32 weight `[out, in]` that the codes stand for."""
        return self._parameters["weight"].float() * self.scale.float()[:, None]

    def seen(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class W8Embedding(_PackedModule):
    """`nn.Embedding` with 8-bit rows. `dtype` is that of the vectors it returns."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx=None, dtype=None, device=None):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = dtype or torch.get_default_dtype()
        self._declare("weight", (num_embeddings, embedding_dim), torch.int8, device)
        self._declare("scale", (num_embeddings,), torch.float16, device)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> W8Embedding:
        weight = embedding.weight.detach()
        layer = cls(*weight.shape, embedding.padding_idx, dtype=weight.dtype, device="meta")
        codes, scale = _fit_rows(weight)
        layer._set("weight", codes)
        layer._set("scale", scale)
        return layer

    def forward(self, ids: Tensor) -> Tensor:
        """`[...]` token ids to `[..., embedding_dim]`.

        Raises:
            W2A4Error: an id that is no row; on a CUDA device the kernel asserts.
        """
        flat = ids.flatten()
        try:  # index_select, unlike an index, takes no negative ids
            weight, scale = self.weight.index_select(0, flat), self.scale.index_select(0, flat)
        except IndexError:
            raise W2A4Error(
                f"token ids from {int(ids.min())} to {int(ids.max())}: this embedding has rows 0 to "
                f"{self.num_embeddings - 1}; a packed model takes no new tokens: add them to the original "
                "and quantise that"
            ) from None
        rows = weight.float() * scale.float()[:, None]
        return rows.to(self.dtype).view(*ids.shape, self.embedding_dim)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dtype={self.dtype}"
