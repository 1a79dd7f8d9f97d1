"""What a GGUF file must be, by its header: every tensor and every key is used, or the file is refused.

transformers passes over keys that it does not know and gives random values to tensors that are not there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .gguf_rope import rope_of

#: Keys below the architecture (`llama.*`) that are read, by us or transformers.
_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length",
}  # fmt: skip

#: Keys that say nothing about the numbers, or nothing if they have this value.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "rope.scaling.finetuned": None, "rope.scaling.attn_factor": (1.0,), "tensor_data_layout": None,
    "expert_count": (0,), "expert_used_count": (0,), "attention.causal": (True,), "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "use_parallel_residual": (False,),
    "attention.sliding_window": (0,), "attention.clamp_kqv": (0.0,), "attention.max_alibi_bias": (0.0,),
}  # fmt: skip

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)

#: The tensor of divisors of RoPE's frequencies.
FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Layout:
    """What a file of an architecture of GGUF holds.

    Attributes:
        model_type: of the transformers model; llama.cpp gives Mistral the architecture `llama`.
        layer: tensors of a layer to their shapes, in names of `sizes`; `2ffn` and `qkv` are joint rows.
        scaled: whether RoPE may be scaled.
        read: keys that are read beside `_READ`.
    """

    model_type: str
    layer: dict[str, tuple[str, ...]]
    scaled: bool = True
    read: frozenset[str] = field(default_factory=frozenset)


_NORMS = {"attn_norm.weight": ("hidden",), "ffn_norm.weight": ("hidden",)}
_OUT = {"attn_output.weight": ("hidden", "q"), "ffn_down.weight": ("hidden", "ffn")}
_QKV = {f"attn_{x}.weight": (rows, "hidden") for x, rows in (("q", "q"), ("k", "kv"), ("v", "kv"))}
_GATED = {"ffn_gate.weight": ("ffn", "hidden"), "ffn_up.weight": ("ffn", "hidden")}
_PLAIN = {**_NORMS, **_OUT, **_QKV, **_GATED}
_BIASES = {"attn_q.bias": ("q",), "attn_k.bias": ("kv",), "attn_v.bias": ("kv",)}
_HEAD_NORMS = {"attn_q_norm.weight": ("head",), "attn_k_norm.weight": ("head",)}
_JOINT = {"attn_qkv.weight": ("qkv", "hidden"), "ffn_up.weight": ("2ffn", "hidden")}

#: By `general.architecture`; transformers reads no GGUF of other families in `arch`.
LAYOUTS = {
    "llama": Layout("llama", _PLAIN),
    "qwen2": Layout("qwen2", {**_PLAIN, **_BIASES}),
    "qwen3": Layout("qwen3", {**_PLAIN, **_HEAD_NORMS}),
    "phi3": Layout("phi3", {**_NORMS, **_OUT, **_JOINT}, False, frozenset({"attention.sliding_window"})),
}


@dataclass(frozen=True)
class Header:
    """What transformers cannot be left to read from a file.

    Attributes:
        layout: of the architecture.
        head_dim, kv_heads: sizes of attention.
        rope: `rope_theta` and the scaling, as a configuration takes them.
        window: tokens that a query sees; None is all before it.
        tensors: how many the file holds, RoPE's factors not counted.
        reader: of the package gguf, of the whole file.
    """

    layout: Layout
    head_dim: int
    kv_heads: int
    rope: dict[str, Any]
    window: int | None
    tensors: int
    reader: Any


def check_gguf(path: Path) -> Header:
    """Check the header of a file.

    Raises:
        CheckpointError: see `load_gguf`.
    """
    reader = _open(path)
    about = _contents(path, reader, ("general.", "split."))
    architecture = str(about.get("general.architecture", "unnamed"))
    if architecture not in LAYOUTS:
        raise CheckpointError(
            f"{path.name} holds architecture {architecture[:60]!r}; from GGUF, w2a4 reads "
            f"{', '.join(map(repr, sorted(LAYOUTS)))}: give the transformers directory of the model"
        )
    layout = LAYOUTS[architecture]
    _check_split(path, about)
    prefix = f"{architecture}."
    keys = {k.removeprefix(prefix): v for k, v in _contents(path, reader, (prefix,)).items()}
    file = File(path.name, prefix, layout, keys)
    file.check_keys()
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    sizes = file.sizes(shapes)
    file.check_tensors(shapes, sizes)
    factors = next((t.data for t in reader.tensors if t.name == FACTORS), None)
    head = sizes["head"]
    rope = rope_of(file, factors, head, layout.scaled)
    tensors = len(shapes.keys() - {FACTORS})
    return Header(layout, head, sizes["kv"] // head, rope, file.window(), tensors, reader)


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise CheckpointError(f"reading {path.name} needs the package gguf: pip install gguf") from None
    try:
        return GGUFReader(path)
    except Exception as error:  # a damaged header can make it fail anywhere
        raise CheckpointError(f"{path.name} is not a GGUF file, or it is truncated: {error}") from None


def _contents(path: Path, reader: Any, prefixes: tuple[str, ...]) -> dict[str, Any]:
    try:
        return {key: field.contents() for key, field in reader.fields.items() if key.startswith(prefixes)}
    except Exception as error:
        raise CheckpointError(f"{path.name} has a damaged header: {error}") from None


def _check_split(path: Path, about: dict[str, Any]) -> None:
    count, name = int(about.get("split.count", 0)), _SPLIT.search(path.name)
    if name is not None and not count:
        count = int(name.group(2))
    if count > 1:
        raise CheckpointError(
            f"{path.name} is one of {count} files of a split model; put them together first: "
            "llama-gguf-split --merge FIRST.gguf WHOLE.gguf"
        )


@dataclass(frozen=True)
class File:
    """The keys of a file.

    Attributes:
        name: of the file.
        prefix: of the keys, `llama.`.
        layout: of its architecture.
        keys: without the prefix.
    """

    name: str
    prefix: str
    layout: Layout
    keys: dict[str, Any]

    def check_keys(self) -> None:
        """Raise CheckpointError for a key that is neither read nor without effect."""
        for key, value in self.keys.items():
            if key in _READ or key in self.layout.read:
                continue
            if key in _NEUTRAL and (_NEUTRAL[key] is None or value in _NEUTRAL[key]):
                continue
            what = "a mixture of experts" if "expert" in key else "a model that differs from its family"
            raise CheckpointError(
                f"{self.name} says {self.prefix}{key} = {str(value)[:60]}, which w2a4 does not read "
                f"({what}); give the transformers directory of the model"
            )
        key = "attention.layer_norm_rms_epsilon"  # transformers has a default, llama.cpp has none
        eps = self.keys.get(key)
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise CheckpointError(
                f"{self.name} says {self.prefix}{key} = {str(eps)[:60]}; w2a4 needs a number between 0 and 1"
            )

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of the header.

        Raises:
            CheckpointError: it is none, or missing without a default.
        """
        value = self.keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise CheckpointError(
                f"{self.name} says {self.prefix}{key} = {str(value)[:60]}; w2a4 needs one whole number"
            )
        return value

    def window(self) -> int | None:
        """Tokens that a query sees, where this architecture has such a key; 0 is written for all."""
        if "attention.sliding_window" not in self.layout.read:
            return None
        return self.number("attention.sliding_window", 0, least=0) or None

    def sizes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """layers, vocabulary, and what `Layout.layer` names, from keys of the right type."""
        hidden, heads = self.number("embedding_length"), self.number("attention.head_count")
        width = self.number("attention.key_length", self.number("rope.dimension_count", hidden // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.number(key, width) != width:
                raise CheckpointError(
                    f"{self.name} says {self.prefix}{key} = {self.keys[key]}, but heads are {width} wide; "
                    "w2a4 reads models whose keys, values and RoPE have the same width"
                )
        # Without this key transformers leaves the rows of q and k of a LLaMA in llama.cpp's order.
        kv = self.number("attention.head_count_kv", None if self.layout.model_type == "llama" else heads)
        vocabulary = shapes.get("token_embd.weight", (0,))[0]
        if self.number("vocab_size", vocabulary or 1) != vocabulary and "token_embd.weight" in shapes:
            raise CheckpointError(
                f"{self.name}: {self.prefix}vocab_size = {self.keys['vocab_size']}, embeddings {vocabulary}"
            )
        q, kv, ffn = heads * width, kv * width, self.number("feed_forward_length")
        return {
            "layers": self.number("block_count"), "vocabulary": vocabulary, "hidden": hidden, "head": width,
            "q": q, "kv": kv, "qkv": q + 2 * kv, "ffn": ffn, "2ffn": 2 * ffn,
        }  # fmt: skip

    def check_tensors(self, shapes: dict[str, tuple[int, ...]], sizes: dict[str, int]) -> None:
        """Every tensor that a model of this family has is there in its shape, and no other."""
        if sizes["layers"] > len(shapes):
            raise CheckpointError(
                f"{self.name} says {self.prefix}block_count = {sizes['layers']} and holds {len(shapes)} "
                "tensors; it is truncated, or part of a split model"
            )
        layer = {name: tuple(sizes[n] for n in shape) for name, shape in self.layout.layer.items()}
        expected = {f"blk.{i}.{n}": shape for i in range(sizes["layers"]) for n, shape in layer.items()}
        table = (sizes["vocabulary"], sizes["hidden"])
        expected |= {"token_embd.weight": table, "output_norm.weight": (sizes["hidden"],)}
        known = {**expected, "output.weight": table}
        if unknown := sorted(shapes.keys() - known.keys() - {FACTORS}):
            raise CheckpointError(
                f"{self.name} holds {_some(unknown)}, which w2a4 does not read{_why(unknown[0])}"
            )
        if missing := sorted(expected.keys() - shapes.keys()):
            raise CheckpointError(
                f"{self.name} lacks {_some(missing)}; it is truncated, or part of a split model"
            )
        for name, shape in known.items():
            if name in shapes and shapes[name] != shape:
                raise CheckpointError(
                    f"{self.name}: {name} is {list(shapes[name])}, its keys say {list(shape)}; download it "
                    "again"
                )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tensors"


def _why(name: str) -> str:
    if name.endswith(".bias"):
        return (
            " (biases); give the transformers directory of the model, with attention_bias in its config.json"
        )
    if "exp" in name or "gate_inp" in name:
        return " (a mixture of experts); give a plain model"
    return "; give the transformers directory of the model"
