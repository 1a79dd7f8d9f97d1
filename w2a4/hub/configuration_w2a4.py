"""Lets transformers load the checkpoint beside this file where w2a4 is installed and nobody imports it.

transformers runs it for who asks with `trust_remote_code`, and for nobody else. It is all the code that a
checkpoint of w2a4 holds; `auto_map` in config.json names it.
"""

from transformers import AutoConfig

import w2a4  # noqa: F401  registers the quantiser, which is all that was missing


class Configuration:
    """Stands for the configuration class of the model's family, which transformers has itself."""

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing: what is saved later does not carry the code of that class."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `AutoConfig.from_pretrained` of a checkpoint without code; saving the model names it again."""
        found = AutoConfig.from_pretrained(*args, trust_remote_code=False, **kwargs)
        vars(found[0] if isinstance(found, tuple) else found).pop("auto_map", None)
        return found
