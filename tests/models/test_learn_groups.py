"""Learning rotations quantises activations in the groups that the packed model will have."""

import copy
import functools

import pytest
import torch

from support.learning import learn, rotations
from support.packed import SHAPE, calibration
from support.tiny_models import decoder_linears, tiny_llama
from w2a4.errors import RecipeError
from w2a4.format.fake_quant import fake_quant_a4
from w2a4.quantization.rotation import descent, network
from w2a4.quantization.rotation import fold as fuse
from w2a4.quantization.rotation import learn as lr
from w2a4.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
#: Only activations are quantised, so that what else a network does is transformers' own.
ACTIVATIONS = {
    "kv_bits": 16,
    "rotation.r3": "none",
    "rotation.r4": "none",
    "rotation_learning.weights": "full",
}


def llama():
    return tiny_llama(dtype=torch.float32, **{**SHAPE, "intermediate_size": 192})


def recipe(group: int, **changes) -> Recipe:
    learned = {"rotation.r1": "learned", "rotation.r2": "learned"}
    return Recipe.load("w2a4kv4").override(**{"act_group_size": group} | learned | ACTIVATIONS | changes)


@torch.no_grad()
def by_hand(model, group: int, objective: str, ids, sign: int) -> float:
    """The objective of transformers' model whose linears' inputs are quantised by hooks."""
    bare = Recipe.load("w2a4kv4").override(
        **{f"rotation.{name}": "none" for name in ("r1", "r2", "r3", "r4")}
    )
    quantised = fuse.rotate(copy.deepcopy(model), bare.rotation)  # norms go into the linears
    clip = sign * torch.tensor([network.CLIP])
    for layer in quantised.model.layers:
        for name, linear in decoder_linears(layer).items():
            # A head of the attention's output is a group, unless groups are smaller.
            size = SHAPE["head_dim"] if name == "o_proj" and group == -1 else group
            quantise = functools.partial(lambda size, module, args: fake_quant_a4(args[0], clip, size), size)
            linear.register_forward_pre_hook(quantise)
    found, target = (each(ids, use_cache=False).logits.log_softmax(-1) for each in (quantised, model))
    if objective == "distill":
        return float((target.exp() * (target - found)).sum(-1).mean())
    return float(-found[:, :-1].gather(-1, ids[:, 1:, None]).mean())


@pytest.mark.parametrize("codes,sign", [("all", -1), ("symmetric", 1)])
@pytest.mark.parametrize("objective", ["network", "distill"])
def test_the_loss_is_that_of_the_groups(objective, codes, sign):
    model, ids, losses = llama(), calibration(2, 16), {}
    eye = {name: r.detach().float() for name, r in rotations(model, "none").items()}
    for group in (-1, 16):
        chosen = recipe(
            group,
            act_codes=codes,
            **{"rotation_learning.objective": objective, "rotation_learning.batch_size": 2},
        )
        losses[group] = lr.OBJECTIVES[objective](model, chosen, ids)(0, eye).item()
        assert losses[group] == pytest.approx(by_hand(model, group, objective, ids, sign), rel=2e-3)
    assert losses[16] != pytest.approx(losses[-1], rel=2e-2 if codes == "symmetric" else 3e-3)


@pytest.mark.parametrize("objective", ["network", "distill", "kurtosis"])
@pytest.mark.parametrize("field", ["act_group_size", "group_size"])
def test_groups_that_do_not_divide_are_refused_first(objective, field, tmp_path, monkeypatch):
    monkeypatch.setattr(descent.Descent, "run", lambda *args: pytest.fail("learned"))
    chosen = recipe(-1, **{"rotation_learning.objective": objective, field: 36})
    with pytest.raises(RecipeError, match=f"{field}=36"):
        learn(llama(), tmp_path / "r.safetensors", calibration(), chosen)
    assert not list(tmp_path.iterdir())
