"""What transformers leaves on a model that was asked for its hidden states once.

Version 5 hooks into every layer for good, and the hooks sleep until the next such call; 4.57 replaces
`forward` of layers and puts it back as an attribute of the instance. Neither changes what a module computes.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def is_capturing(hook: Any) -> bool:
    """The hook is transformers' own that collects hidden states."""
    module = getattr(hook, "__module__", None) or ""
    return module.startswith("transformers.") and hook.__name__ == "output_capturing_hook"


def is_watched(module: nn.Module) -> bool:
    """Someone hooked into the module, or replaced its forward (as accelerate does).

    What sleeps there after a call that asked for hidden states does not count, nor do hooks of w2a4.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not (is_capturing(hook) or is_own(hook)) for hook in hooks) or has_foreign_forward(module)


def is_own(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("w2a4.")


def has_foreign_forward(module: nn.Module) -> bool:
    """Someone replaced the module's forward, as accelerate does."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    while _is_wrapper(forward):
        forward = forward.__wrapped__
    own = getattr(forward, "__self__", None) is module
    return not (own and forward.__func__ is type(module).forward)


def _is_wrapper(forward: Any) -> bool:
    """4.57's own, which stays there if the call it was made for ends in an error."""
    code = getattr(forward, "__code__", None)
    return code is not None and code.co_name == "wrapped_forward" and "transformers" in code.co_filename


def forget_capturing(model: nn.Module) -> None:
    """Remove it; transformers puts it there again when it is needed."""
    for module in model.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if is_capturing(hook)]:
            del hooks[key]
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        if "forward" in module.__dict__ and not has_foreign_forward(module):
            del module.__dict__["forward"]
