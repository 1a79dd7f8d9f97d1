"""Files of a checkpoint that every supported transformers reads alike, whichever wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..format.files import write_json

#: The code in a checkpoint, and how config.json calls its class.
CODE = Path(__file__).with_name("configuration_w2a4.py")
AUTO_MAP = {"AutoConfig": f"{CODE.stem}.Configuration"}

#: Where transformers 4 looks for RoPE's base, if a configuration has none.
DEFAULT_THETA = 10000.0

#: Names of tokenizer classes that only transformers 5 knows, by those that all know.
TOKENIZERS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def write_config(path: Path, dtype: torch.dtype, family: bool = True, code: bool = True) -> None:
    """Mend config.json: its dtype, its RoPE, and the code by which it loads, which is written beside it.

    transformers 4.57 takes the dtype of the first parameter, which may be a scale's. Version 5 writes
    `rope_parameters`, which 4.57 ignores without a word; it reads `rope_theta` and `rope_scaling`.

    Args:
        family: whether the model is of one in `arch`. Of others the RoPE stays as it is, and so does code
            that the model needs itself.
        code: whether the model needs w2a4 to load.
    """
    config = json.loads(path.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    if family and (parameters := config.get("rope_parameters")):
        config["rope_theta"], config["rope_scaling"] = _older_rope(parameters)
    if code and (family or config.get("auto_map") in (None, AUTO_MAP)):
        config["auto_map"] = AUTO_MAP
        shutil.copyfile(CODE, path.with_name(CODE.name))
    write_json(path, dict(sorted(config.items())))  # as transformers does, so that a copy has these bytes


def _older_rope(rope: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling` for what version 5 calls `rope_parameters`."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return rope.get("rope_theta", DEFAULT_THETA), None if _plain(scaling) else scaling


def _plain(scaling: dict[str, Any] | None) -> bool:
    return not scaling or scaling.get("rope_type", scaling.get("type")) == "default"


def check_rope(config: Any) -> None:
    """Refuse a configuration of transformers 5 that an older transformers reads without its RoPE.

    Raises:
        CheckpointError: `rope_parameters` say something else than what the model computes.
    """
    rope = getattr(config, "rope_parameters", None)
    if not rope or not hasattr(config, "rope_scaling") or not hasattr(config, "rope_theta"):
        return
    theta, scaling = _older_rope(rope)
    own = None if _plain(config.rope_scaling) else config.rope_scaling
    if theta != config.rope_theta or scaling != own:
        raise CheckpointError(
            f"config.json has rope_parameters={rope}, which this transformers does not read: it would take "
            f"rope_theta={config.rope_theta}, rope_scaling={own}; write these two into config.json as well, "
            "or use transformers 5"
        )


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Save a tokenizer so that every supported transformers loads it."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("tokenizer_class")
    config["tokenizer_class"] = TOKENIZERS.get(name, name)
    # A list in version 5, which 4.57 cannot read there; a dict in 4.57, and if that is empty it hides the
    # list of `additional_special_tokens` from version 5. That list all read.
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list) or not extra:
        config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        config["additional_special_tokens"] = extra
    write_json(path, config)
