"""Rotations of a model to learn, and a call that learns them."""

import torch

from w2a4.format.online import OnlineRotation
from w2a4.quantization.rotation import learn as lr
from w2a4.recipe import Recipe


def rotations(model, kind: str = "random") -> dict[str, torch.Tensor]:
    sizes = {"R1": model.config.hidden_size}
    sizes |= {f"R2.{i}": model.config.head_dim for i in range(model.config.num_hidden_layers)}
    return {name: OnlineRotation(kind, n, 3, name).matrix().requires_grad_() for name, n in sizes.items()}


def learn(model, out, ids, chosen: Recipe, **arguments):
    return lr.learn_rotation(model, None, chosen, ids, out, progress=False, **arguments)
