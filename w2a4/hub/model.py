"""What a rotated or quantised model does differently from its transformers class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import StaticCache

from ..errors import W2A4Error
from ..evaluate.report import Report, checkpoint_summary, model_card
from ..format.digests import add_digests
from ..format.files import write_atomically
from ..format.linear import _PackedModule
from ..recipe import write_yaml
from ..runtime.arguments import cache_of
from ..runtime.attention import NAME
from ..runtime.capturing import forget_capturing
from ..runtime.classes import Derived, original
from ..runtime.guards import adopt, is_own, no_other_attention
from ..runtime.kv_cache import check_static, settings_of
from . import portable
from .checkpoint import atomic_directory
from .generation import as_it_came

if TYPE_CHECKING:
    from .transformers import W2A4Config


def adapted_module(model: nn.Module) -> str | None:
    """The name of the first module that has an adapter of PEFT's; None if there is none."""
    return next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)


class WholeSaves(Derived):
    """Base of mixins: what is saved is whole, and instances are made as of the original class."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(model)(config)` is a model of transformers, which nothing was done to yet."""
        return original(cls)(*args, **kwargs) if args or kwargs else object.__new__(cls)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of the transformers class: what is loaded decides whether it is packed."""
        return original(cls).from_pretrained(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        *args,
        push_to_hub: bool = False,
        variant: str | None = None,
        **kwargs,
    ) -> None:
        """As transformers', but whole or not at all, with digests and what `_write_beside` adds."""
        if push_to_hub:
            raise ValueError("save first, then upload the directory: push_to_hub=True is not supported here")
        if variant is not None:
            raise W2A4Error(
                f"variant={variant!r} is not supported: the files of a packed model have one name; leave it "
                "out, and save each variant into a directory of its own"
            )
        if not is_main_process:  # the main process writes for all
            return
        adapted = adapted_module(self)
        if adapted is not None and not getattr(self, "_hf_peft_config_loaded", False):
            raise W2A4Error(
                f"{adapted} has an adapter: save the adapters by the save_pretrained of PEFT's model, or put "
                "them into the weights first, by its merge_and_unload"
            )
        with atomic_directory(save_directory) as directory:
            if any(value.is_inference() for value in self.parameters()):  # transformers does not save these
                kwargs.setdefault("state_dict", {n: v.clone() for n, v in self.state_dict().items()})
            with as_it_came(self, directory):
                super().save_pretrained(directory, True, *args, **kwargs)
            self._mend_config(directory / "config.json")
            add_digests(directory)
            self._write_beside(directory)

    def _mend_config(self, path: Path) -> None:
        """Write config.json so that all versions of transformers read it alike."""
        portable.write_config(path, self.dtype)

    def _write_beside(self, directory: Path) -> None:
        """Write the files beside config and tensors."""
        raise NotImplementedError


class PackedModelMixin(WholeSaves):
    """Mixed in by `transformers.install`."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        forget_capturing(self)  # its hooks cannot be pickled
        return super().__reduce_ex__(protocol)

    @property
    def dtype(self) -> torch.dtype:
        """That of activations; the first parameter may be a code or a scale."""
        return self.model.norm.weight.dtype

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **others: Any
    ) -> Any:
        """As transformers', but W2A4Error if a cache that was given is too small for what is asked.

        Only here is the length known before the work, and without waiting for a device.
        """
        length = others.get("max_cache_length", rest[-1] if rest else 0)
        check_static(cache_of(model_kwargs), length)
        out = super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **others)
        made, settings = cache_of(model_kwargs), settings_of(self.model.layers)
        if settings[0].kv_bits == 4 and type(made) is StaticCache:
            adopt(made, settings, length)
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """RoPE's frequencies stay in float32, as in a model that is loaded in this dtype."""
        rotary = self.model.rotary_emb
        before = {name: buffer for name, buffer in rotary.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = rotary._buffers[name]
            if now.dtype != buffer.dtype:
                rotary._buffers[name] = buffer.to(now.device)
        if "original_inv_freq" in rotary.__dict__:  # transformers keeps it as a plain attribute
            rotary.original_inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device)
        return self

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', but W2A4Error where that attention would drop the 4-bit KV cache or a prefix."""
        settings = self.model.layers[0].self_attn.kv_settings
        asked = attn_implementation
        asked = set(asked.values()) if isinstance(asked, dict) else {asked}
        if is_own(settings) and asked != {NAME}:
            raise W2A4Error(no_other_attention(attn_implementation))
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but W2A4Error if embedding or head are packed and would have to grow."""
        parts = self.get_input_embeddings(), self.get_output_embeddings()
        pad = kwargs.get("pad_to_multiple_of", args[0] if args else None)
        same = pad is None and new_num_tokens in (None, self.config.vocab_size)
        if not same and any(isinstance(part, _PackedModule) for part in parts):
            raise W2A4Error(
                f"resize_token_embeddings({new_num_tokens}): the embedding or lm_head of this model is "
                f"packed with {self.config.vocab_size} rows; resize the original and quantise that, or "
                "quantise with embed_bits=16 and head_bits=16"
            )
        return parts[0] if same else super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _write_beside(self, directory: Path) -> None:
        """recipe.yaml, report.json and a model card."""
        config: W2A4Config = self.config.quantization_config
        write_yaml(directory / "recipe.yaml", config.recipe)
        report = self.w2a4_report or Report(
            source=config.provenance.get("source", "unknown"), recipe=config.recipe
        )
        report.sizes = checkpoint_summary(directory)["bytes"]
        report.to_json(directory / "report.json")
        write_atomically(directory / "README.md", model_card(report))


def report_beside(source: str) -> Report | None:
    """The report of the checkpoint a model was loaded from, to travel with it when it is saved again."""
    path = Path(source or ".") / "report.json"
    return Report.from_json(path) if source and path.is_file() else None
