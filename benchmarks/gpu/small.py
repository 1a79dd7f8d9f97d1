"""Small checkpoints: of a trained model only what training changed, in files that may come back from a call.

The embedding, the head and the norms follow from the original model and the recipe; `restore` makes them anew
and puts the trained linears in.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import w2a4
from w2a4.train.linear import fake_quant_linears
from w2a4.train.prepare import start_recipe

#: Bytes of a file.
SHARD = 15 << 20
NAME = "trained-{}.safetensors"


@torch.no_grad()
def write(model: nn.Module, recipe: w2a4.Recipe, step: int, folder: Path) -> int:
    """Pack the trained linears of a prepared model as they are now; returns the bytes."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, linear in fake_quant_linears(model).items():
        packed = {
            f"{name}.{key}": value.cpu().contiguous()
            for key, value in linear.to_packed().state_dict().items()
        }
        added = sum(value.nbytes for value in packed.values())
        if size + added > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1].update(packed)
        size, total = size + added, total + added
    facts = {"recipe": json.dumps(recipe.to_dict()), "step": str(step), "shards": str(len(shards))}
    for number, tensors in enumerate(shards, 1):
        part = folder / (NAME.format(number) + ".part")
        save_file(tensors, part, facts)
        part.replace(folder / NAME.format(number))
    return total


def restore(source: str, folder: Path, out: Path) -> int:
    """A whole checkpoint of the original model and small files; returns the step that these are of.

    Raises:
        W2A4Error: files are missing or of different steps, or do not fit the model.
    """
    files = sorted(folder.glob(NAME.format("*")))
    state: dict[str, Tensor] = {}
    facts: set[tuple[str, str]] = set()
    recipe = None
    for file in files:
        with safe_open(file, "pt") as content:
            found = content.metadata()
            facts.add((found["step"], found["shards"]))
            recipe = w2a4.Recipe.from_dict(json.loads(found["recipe"]))
            state |= {name: content.get_tensor(name) for name in content.keys()}
    if len(facts) != 1 or recipe is None or len(files) != int(next(iter(facts))[1]):
        names = ", ".join(file.name for file in files) or "nothing"
        raise w2a4.W2A4Error(
            f"{folder} holds {names}, not all {NAME.format('N')} of one step; fetch them again"
        )
    model, tokenizer = w2a4.load_model(source, dtype=torch.float32)  # as it was trained
    # Which text calibrates does not matter: what it decides is replaced.
    quick = start_recipe(recipe).override(weight_method="rtn", act_clip=0.9, calib_samples=1, calib_seqlen=16)
    w2a4.quantize(model, tokenizer, quick, progress=False)
    wanted = {
        f"model.layers.{index}.{path}.{key}": value
        for index, layer in enumerate(model.model.layers)
        for path, linear in layer.linears().items()
        for key, value in linear.state_dict().items()
    }
    wrong = sorted(set(wanted) ^ set(state)) or [k for k, v in wanted.items() if v.shape != state[k].shape]
    if wrong:
        raise w2a4.W2A4Error(f"{folder} is of another model than {source}: {wrong[0]} does not fit")
    model.load_state_dict(state, strict=False)
    w2a4.save(model, tokenizer, out)
    return int(next(iter(facts))[0])
