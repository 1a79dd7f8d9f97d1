"""Shapes that benchmarks measure, derived from the dimensions of published LLaMA-shaped models.

    python -m benchmarks.shapes  # prints them

`lm_head` is left out: it is quantised to 8 bits, by another op.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Dimensions as in a checkpoint's config.json."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """`(out, in)` of every linear of a layer, by its name in transformers."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "gate_up_proj": (2 * self.intermediate, self.hidden),  # both in one call
            "down_proj": (self.hidden, self.intermediate),
        }


MODELS = {
    "llama-2-7b": Model(4096, 11008, 32, 32, 128, 32, 32000),
    "llama-2-13b": Model(5120, 13824, 40, 40, 128, 40, 32000),
    "llama-2-70b": Model(8192, 28672, 64, 8, 128, 80, 32000),
    "llama-3-8b": Model(4096, 14336, 32, 8, 128, 32, 128256),
    "llama-3.2-1b": Model(2048, 8192, 32, 8, 64, 16, 128256),
    "llama-3.2-3b": Model(3072, 8192, 24, 8, 128, 28, 128256),
    "smollm2-135m": Model(576, 1536, 9, 3, 64, 30, 49152),
}

#: Widths of other published models, for the Hadamard transform; the last row has no known order, so
#: that the transform is block-diagonal.
OTHER_WIDTHS = (
    512, 1024, 5632, 8960, 16384, 27648, 53248,
    4864, 18944, 29568,
)  # fmt: skip


@dataclass(frozen=True, order=True)
class LinearShape:
    """A weight matrix `[out, in]` with one scale for `group` inputs."""

    out: int
    features: int

    @property
    def group(self) -> int:
        return group_size(self.features)

    def __str__(self) -> str:
        return f"{self.out}x{self.features}"


def group_size(features: int) -> int:
    """The recipes' group: 128, or 64 where 128 does not divide, or the whole row."""
    return next((group for group in (128, 64) if features % group == 0), features)


def linear_shapes(models: Iterable[str]) -> list[LinearShape]:
    """Every shape of these models once, smallest first.

    Raises:
        KeyError: a model is not in `MODELS`.
    """
    shapes = {LinearShape(*shape) for name in models for shape in MODELS[name].linears().values()}
    return sorted(shapes, key=lambda shape: (shape.out * shape.features, shape))


def hidden_sizes(models: Iterable[str]) -> list[int]:
    """Widths that RMSNorm and its quantisation work on."""
    return sorted({MODELS[name].hidden for name in models})


def intermediate_sizes(models: Iterable[str]) -> list[int]:
    """Widths that R4 and its quantisation work on."""
    return sorted({MODELS[name].intermediate for name in models})


def hadamard_sizes(models: Iterable[str] | None = None) -> list[int]:
    """Widths of the online transforms (R3, R4) of these models; of all models and others by default."""
    names = MODELS if models is None else models
    sizes = {width for name in names for width in (MODELS[name].head_dim, MODELS[name].intermediate)}
    if models is None:
        sizes |= set(OTHER_WIDTHS) | {model.hidden for model in MODELS.values()}
    return sorted(sizes)


if __name__ == "__main__":
    for shape in linear_shapes(MODELS):
        print(f"{shape} group {shape.group}")
    print("hadamard", *hadamard_sizes())
