"""What a quantised checkpoint is and cost: the report, its tables, its model card, its sizes.

Everything here is computed from numbers others fill in, or from `config.json` and the headers of
safetensors files; no tensor is loaded.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import CheckpointError
from ..format.files import json_text, write_atomically
from ..format.files import write_json as write_json
from ..format.headers import read_config, safetensors_header, shards_of
from ..format.manifest import is_replacement, read_manifest
from ..ops.packing import packed_width
from ..recipe import Recipe
from ..version import VERSION
from . import quality
from .quality import table

#: Bytes of a checkpoint by part, in the order tables print them.
PARTS = {
    "codes": "decoder linears: codes",
    "levels": "decoder linears: levels",
    "scales": "decoder linears: scales",
    "kept": "decoder linears: not quantised",
    "embeddings": "embeddings",
    "head": "lm_head",
    "norms": "norms",
    "biases": "biases",
    "other": "other",
}

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


#: What `Report.to_dict` gives, as JSON holds it: a number that is not finite is null there.
_KINDS: dict[str, Any] = {
    "recipe": Mapping, "source": str, "calibration": str, "seed": int, "layers": list, "sizes": Mapping,
    "seconds": int | float, "peak_memory_mb": int | float, "versions": Mapping,
    "evaluation": Mapping | None, "training": Mapping | None,
}  # fmt: skip
_LAYER: dict[str, Any] = {
    "name": str, "bits": int, "group_size": int, "relative_error": int | float | None,
}  # fmt: skip


@dataclass
class Report:
    """How a checkpoint came about; `report.json` in the checkpoint.

    Attributes:
        recipe: `Recipe.to_dict()`.
        source: the model quantised: a hub id, or the last part of a local path; empty if not known.
        calibration: see `data.describe_text`.
        seed: of the rotations and calibration windows.
        layers: one entry a quantised linear, see `add_layer`.
        sizes: bytes by part, see `PARTS` and `measure_tensors`.
        seconds: wall-clock time of quantising.
        peak_memory_mb: of the process that quantised, see `peak_memory_mb`.
        versions: of the software used.
        evaluation: what was measured, see `quality.evaluation`, or None. A report of an earlier version has
            one dict where there is a list now, and is brought to this form.
        training: what `w2a4 train` did: losses, steps, tokens, minutes, text, peak memory, perplexities;
            errors of layers on the route `block`; or None.
    """

    recipe: dict[str, Any]
    source: str = ""
    calibration: str = ""
    seed: int = 0
    layers: list[dict[str, Any]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    versions: dict[str, str] = field(default_factory=lambda: versions())
    evaluation: dict[str, Any] | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.source = source_name(self.source)
        found = [(self.evaluation or {}).get(key) for key in ("before", "after")]
        if any(isinstance(measured, Mapping) for measured in found):
            self.add_evaluation(*([measured] if measured else [] for measured in found))

    @property
    def fitted_on(self) -> dict[str, str]:
        """Lines of `data.describe_text` by what the text was for: `calibration`, `training`."""
        texts = {"calibration": self.calibration, "training": (self.training or {}).get("text")}
        return {use: text for use, text in texts.items() if text}

    def add_evaluation(self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
        """Record what `perplexity.evaluate` returned of full precision and of the checkpoint."""
        self.evaluation = quality.evaluation(before, after, self.fitted_on)

    def add_layer(self, name: str, bits: int, group_size: int, relative_error: float) -> None:
        """Record one quantised linear; the error is that of `LayerQuantizer.run`."""
        entry = {
            "name": name,
            "bits": bits,
            "group_size": group_size,
            "relative_error": float(relative_error),
        }
        self.layers.append(entry)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`; keys of a later version are ignored.

        Raises:
            CheckpointError: not a report, or a part of it is of another kind than `to_dict` gives.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        _check_kinds(data)
        try:
            return cls(**{key: value for key, value in data.items() if key in known})
        except TypeError as error:
            raise CheckpointError(f"report.json is not a report: {error}") from None

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if given."""
        text = json_text(self.to_dict())
        if path is not None:
            write_atomically(path, text)
        return text

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> Report:
        """From JSON text (a string beginning with `{`) or from a file."""
        text = str(text_or_path)
        if not text.lstrip().startswith("{"):
            text = Path(text_or_path).read_text(encoding="utf-8")
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise CheckpointError(f"the report is not JSON: {error}") from None


def _check_kinds(data: Any) -> None:
    """Raise CheckpointError unless what a report.json holds can be printed as a `Report`."""

    def check(name: str, value: Any, kind: Any) -> None:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(
                f"report.json is not a report: {name} is {str(value)[:60]!r}; copy or download it again, or "
                "remove it"
            )

    check("the whole", data, Mapping)
    for key, kind in _KINDS.items():
        if key in data:
            check(key, data[key], kind)
    for i, layer in enumerate(data.get("layers", [])):
        check(f"layers[{i}]", layer, Mapping)
        for key, kind in _LAYER.items():
            check(f"layers[{i}].{key}", layer.get(key), kind)
    for key, value in data.get("sizes", {}).items():
        check(f"sizes.{key}", value, int)
    check("training.text", (data.get("training") or {}).get("text"), str | None)
    evaluation = data.get("evaluation") or {}
    for key in ("before", "after"):
        measured = evaluation.get(key)
        check(f"evaluation.{key}", measured, Mapping | list | None)  # a list since several texts are measured
        listed = measured if isinstance(measured, list) else [measured] if measured else []
        for i, result in enumerate(listed):
            _check_measured(f"evaluation.{key}[{i}]", result, check)


def _check_measured(name: str, result: Any, check: Callable[[str, Any, Any], None]) -> None:
    """`_check_kinds` of one text."""
    check(name, result, Mapping)
    for part in ("perplexity", "low", "high"):
        check(f"{name}.{part}", result.get(part), int | float | None)
    for part in ("windows", "seqlen", "tokens"):
        check(f"{name}.{part}", result.get(part), int)
    for part in ("text", "tokens_sha256"):
        check(f"{name}.{part}", result.get(part), str | None)
    check(f"{name}.losses", result.get("losses"), list | None)
    for i, loss in enumerate(result.get("losses") or []):
        check(f"{name}.losses[{i}]", loss, int | float | None)


def training_text(training: Mapping[str, Any]) -> str:
    """One line on a training run, see `Report.training`."""
    losses = training.get("losses") or []
    fall = f", loss {losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""
    return f"{training['steps']} steps in {training['minutes']:.1f} minutes on {training['text']}{fall}"


def source_name(source: str | Path) -> str:
    """A hub id as it is; of a local path only the last part, so that reports hold no directories.

    >>> source_name("HuggingFaceTB/SmolLM2-135M"), source_name("/data/models/llama.gguf")
    ('HuggingFaceTB/SmolLM2-135M', 'llama.gguf')
    """
    text = str(source)
    if not text or (re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not Path(text).exists()):
        return text
    return Path(text).name or Path(text).resolve().name


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide the numbers."""
    found = {"python": platform.python_version(), "w2a4": VERSION}
    for package in ("torch", "transformers", "safetensors"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Sizes


def checkpoint_summary(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint directory holds, packed or plain, read from headers only.

    Returns:
        quantized, architecture, source, manifest, recipe, provenance, format_version, w2a4_version,
        weights and bits_per_weight (each with `linears`, the quantised decoder linears, and `model`),
        bytes (by part, see `PARTS`, and `total`), disk_bytes (every file), files.

    Raises:
        CheckpointError: not a checkpoint, or a safetensors file that is missing or truncated.
    """
    directory = Path(directory)
    config = read_config(directory)
    shards = shards_of(directory)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards:
        tensors |= safetensors_header(shard)
    quantization = config.get("quantization_config") or {}
    quantized = quantization.get("quant_method") == "w2a4"
    return {
        "path": directory.resolve().name,
        "architecture": _architecture(config),
        "quantized": quantized,
        **{key: quantization.get(key) for key in ("format_version", "w2a4_version")},
        **{key: quantization.get(key) or {} for key in ("manifest", "recipe", "provenance")},
        **measure_tensors(tensors, config),
        "disk_bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "files": [shard.name for shard in shards],
    }


def measure_tensors(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Logical weights, bits a weight and bytes by part of a set of tensors.

    Bits a weight are all bytes that stand for the weights (codes, levels, scales) times 8, over the
    number of weights before packing.

    Args:
        tensors: name to safetensors dtype (`U8`, `F16`, …) and shape.
        config: of the model; widths packed away by padding are looked up in it.

    Returns:
        weights, bits_per_weight, bytes; see `checkpoint_summary`.
    """
    size = dict.fromkeys(PARTS, 0)
    weights = {"linears": 0, "model": 0}
    packed = {name.rpartition(".")[0] for name, (dtype, _) in tensors.items() if dtype == "U8"}
    for name, (dtype, shape) in tensors.items():
        part = _part(name, shape, packed)
        size[part] += math.prod(shape) * _BYTES.get(dtype, 1)
        if part == "codes":
            module = name.rpartition(".")[0]
            _, levels = tensors.get(f"{module}.levels", ("", (2**4,)))  # 4 bits have none
            logical = shape[0] * _in_features(module, shape[1], levels[-1].bit_length() - 1, config)
            weights["linears"] += logical
        else:
            # Experts of transformers 5 are parameters of three dimensions without such an ending.
            counts = name.endswith((".weight", ".bias")) or (part == "other" and len(shape) > 2)
            logical = math.prod(shape) if counts else 0
        weights["model"] += logical
    total = sum(size.values())
    linears = size["codes"] + size["levels"] + size["scales"]
    bits = {
        "linears": linears * 8 / weights["linears"] if weights["linears"] else None,
        "model": total * 8 / weights["model"] if weights["model"] else None,
    }
    return {"weights": weights, "bits_per_weight": bits, "bytes": {**size, "total": total}}


def _part(name: str, shape: Sequence[int], packed: set[str]) -> str:
    module, _, leaf = name.rpartition(".")
    last = module.rpartition(".")[2]
    if leaf == "bias":
        return "biases"
    if last == "embed_tokens":
        return "embeddings"
    if last == "lm_head":
        return "head"
    if last.endswith("norm"):
        return "norms"
    if module in packed and leaf in ("weight", "levels", "scale"):
        return {"weight": "codes", "levels": "levels", "scale": "scales"}[leaf]
    return "kept" if leaf == "weight" and len(shape) == 2 else "other"


def _in_features(module: str, width: int, bits: int, config: Mapping[str, Any]) -> int:
    """Inputs of a packed linear: from the config, since the last byte of a row may be padded.

    Configs of any model do not say which size a linear has: where linears were replaced, padding counts.
    """
    capacity = width * 8 // bits
    if is_replacement(config.get("quantization_config")):
        return capacity
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    head_dim = _size(config, "head_dim") or (hidden // heads if hidden and heads else None)
    last = module.rpartition(".")[2]
    if last == "down_proj":
        inputs = _size(config, "intermediate_size")
    elif last == "o_proj":
        inputs = heads * head_dim if heads and head_dim else None
    else:
        inputs = hidden
    if inputs is None:
        return capacity
    if packed_width(inputs, bits) != width:
        raise CheckpointError(
            f"{module}: rows of {width} bytes hold {capacity} codes of {bits} bits, but config.json says "
            f"{inputs} inputs; the checkpoint and its config do not belong together"
        )
    return inputs


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "unknown"


def _size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise CheckpointError(
            f"config.json says {key}={str(value)[:40]}, not a whole number from 1 on; it is damaged, copy or "
            "download it again"
        )
    return value


# Tables and the model card


def bytes_table(summary: Mapping[str, Any], markdown: bool = False) -> str:
    """Bytes by part of a `checkpoint_summary` (or of `Report.sizes` under the key `bytes`)."""
    size = summary["bytes"]
    total = size.get("total") or sum(size.values())
    rows = [
        {"part": label, "MB": f"{size[part] / 1e6:.2f}", "share": f"{size[part] / total:.1%}"}
        for part, label in {**PARTS, "total": "total"}.items()
        if size.get(part)
    ]
    return table(rows, markdown)


def layers_table(report: Report, markdown: bool = False) -> str:
    """Mean and worst relative error by kind of linear (`q_proj`, `down_proj`, …)."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for layer in report.layers:
        kinds.setdefault(layer["name"].rpartition(".")[2], []).append(layer)
    rows = []
    for kind, layers in kinds.items():
        errors = [math.nan if (e := layer["relative_error"]) is None else e for layer in layers]
        rows.append({
            "linear": kind, "count": len(layers), "bits": layers[0]["bits"],
            "group size": layers[0]["group_size"], "mean error": f"{sum(errors) / len(errors):.2%}",
            "worst": f"{max(errors):.2%}",
        })  # fmt: skip
    return table(rows, markdown)


def measured_of(report: Report) -> dict[str, list[dict[str, Any]]]:
    """What the report's `evaluation` holds of full precision and of the checkpoint, by their names."""
    found = report.evaluation or {}
    labels = {"before": quality.FULL_PRECISION, "after": quality.CHECKPOINT}
    return {label: found[key] for key, label in labels.items() if found.get(key)}


def quality_of(report: Report, markdown: bool = False) -> str:
    """The table of the report's `evaluation`; empty if nothing was measured."""
    models = measured_of(report)
    return quality.quality_text(models, markdown) if models else ""


def summary_text(summary: Mapping[str, Any]) -> str:
    """A `checkpoint_summary` for people: bits a weight, bytes by part, rotations, provenance."""
    bits, weights = summary["bits_per_weight"], summary["weights"]
    lines = [f"{summary['path']}: {summary['architecture']}, {weights['model'] / 1e6:.1f} M weights"]
    if summary["quantized"]:
        recipe = summary["recipe"]
        made_by = f"format {summary['format_version']}, w2a4 {summary['w2a4_version']}"
        if is_replacement(summary):
            lines.append(
                f"{len(read_manifest(summary).kinds)} linears replaced, rounded to nearest; {made_by}"
            )
        else:
            lines.append(f"recipe {recipe.get('name')}, {made_by}")
            lines.append(f"rotations: {_rotations(recipe)}")
        if bits["linears"] is None:  # rotated only, or quantised in the embeddings and the cache
            lines.append(f"no linear is quantised; bits a weight: {_bits(bits['model'])} in the whole model")
        else:
            lines.append(
                f"bits a weight: {_bits(bits['linears'])} in the quantised linears, codebooks and scales "
                f"included; {_bits(bits['model'])} in the whole model"
            )
    else:
        lines.append(f"not quantised; bits a weight: {_bits(bits['model'])}")
    lines += [f"{key}: {value}" for key, value in summary["provenance"].items()]
    return "\n".join([*lines, "", bytes_table(summary), "", f"on disk: {summary['disk_bytes'] / 1e6:.1f} MB"])


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def model_card(report: Report) -> str:
    """The README.md of a checkpoint: Markdown with the front matter that the hub reads."""
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["w2a4", "quantized", str(report.recipe.get("name"))],
    }
    if "/" in report.source:
        front["base_model"] = report.source
    recipe = Recipe().to_dict() | report.recipe
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"
        f"# {report.source or 'A LLaMA'}, quantised with `{recipe['name']}`",
        f"Weights in {recipe['weight_bits']} bits, activations in {recipe['act_bits']}, KV cache in "
        f"{recipe['kv_bits']}, made with `w2a4`. The licence is that of the base model.",
        _CARD_USE,
        f"## Recipe\n\nRotations: {_rotations(report.recipe)}.\n"
        f"Calibration: {report.calibration or 'none'}.\n\n"
        f"```yaml\n{yaml.safe_dump(report.recipe, sort_keys=False)}```",
        f"## Quality\n\n{quality_of(report, markdown=True) or _UNMEASURED}",
    ]
    if report.sizes:
        sections.append(f"## Size\n\n{bytes_table({'bytes': report.sizes}, markdown=True)}")
    if report.layers:
        sections.append(
            "## Error of each kind of linear\n\nRelative error of the output on calibration text.\n\n"
            + layers_table(report, markdown=True)
        )
    made = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    sections.append(
        f"## Provenance\n\nQuantised in {report.seconds:.0f} s, {report.peak_memory_mb:.0f} MB at the peak; "
        f"seed {report.seed}; {made}."
    )
    sections.append(_limitations(recipe))
    return "\n\n".join(sections) + "\n"


_UNMEASURED = "Perplexity was not measured when this checkpoint was made: run `w2a4 eval PATH`."

_CARD_USE = """## Use

```python
import w2a4  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```"""


def _rotations(recipe: Mapping[str, Any]) -> str:
    rotation = recipe.get("rotation") or {}
    return ", ".join(f"{name.upper()} {rotation.get(name, 'none')}" for name in ("r1", "r2", "r3", "r4"))


def _limitations(recipe: Mapping[str, Any]) -> str:
    points = ["It needs w2a4 to load. Its kernels were run on x86 CPUs and on one NVIDIA H200."]
    if recipe["weight_bits"] == 2:
        points.append("Two-bit weights fitted without training lose much quality: not for real work.")
    if recipe["act_bits"] == 4:
        points.append("Activations are quantised at run time, so outputs differ from the base model's.")
    return "## Limitations\n\n" + "\n".join(f"- {point}" for point in points)
