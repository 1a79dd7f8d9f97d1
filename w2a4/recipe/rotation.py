"""The parts of a recipe that say which rotations a model gets, and how they are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError
from ..format.kinds import OnlineKind, RotationKind
from .limits import SCHEMA


@dataclass(frozen=True)
class RotationConfig:
    """Which rotation goes where (R1 residual stream, R2 value heads, R3 q/k, R4 down_proj).

    `docs/method.md` has the formulas.

    Attributes:
        r1: rotation of the residual stream, `hidden_size` wide, folded into the weights.
        r2: rotation of each value head, `head_dim` wide, one a layer, folded into v_proj and o_proj.
        r3: online rotation of queries and keys after RoPE, `head_dim` wide.
        r4: online rotation of down_proj's input, `intermediate_size` wide, its inverse folded.
        r4_blocks: with r4 `hadamard`, R4 is so many equal blocks on a diagonal, of which each of as many
            processes of tensor parallelism can hold one; more blocks spread outliers less far.
        seed: from it every random rotation is drawn, independent of torch's global generator.
        learned: safetensors file with the `R1` and `R2.<layer>` that `learned` takes, or SpinQuant's
            `R.bin`; None means that they are to be learned first, as `RotationLearning` says.
    """

    r1: RotationKind = "random_hadamard"
    r2: RotationKind = "random_hadamard"
    r3: OnlineKind = "hadamard"
    r4: OnlineKind = "hadamard"
    r4_blocks: int = 1
    seed: int = 0
    learned: str | None = None

    def __post_init__(self) -> None:
        SCHEMA.check(self)
        SCHEMA.check_least(self, {"r4_blocks": 1}, "rotation.")
        if self.r4_blocks > 1 and self.r4 != "hadamard":
            raise RecipeError(
                f"rotation.r4_blocks={self.r4_blocks} with rotation.r4={self.r4!r}: only 'hadamard' is made "
                "of blocks that are alike; give r4_blocks=1"
            )

    @property
    def is_identity(self) -> bool:
        """True if nothing is rotated, offline or online."""
        return {self.r1, self.r2, self.r3, self.r4} == {"none"}

    @property
    def to_learn(self) -> bool:
        """True if rotations are to be learned first."""
        return "learned" in (self.r1, self.r2) and self.learned is None


@dataclass(frozen=True)
class RotationLearning:
    """How rotations are learned where `RotationConfig` says `learned` and names no file.

    Attributes:
        objective: `network` minimises the cross-entropy of the whole fake-quantised model (SpinQuant);
            `distill` its divergence from the full-precision model, whose gradients are far less noisy;
            `kurtosis` brings the kurtosis of activations near that of a uniform distribution, layer by
            layer, without a pass backward through the model (KurTail).
        steps: of Cayley SGD.
        lr: learning rate of the first step.
        schedule: what the rate falls along, `linear` or `cosine` to 0, or not at all (`constant`).
        momentum: share of the last step's direction kept.
        max_grad_norm: gradients of all matrices are scaled down together to this norm, without which the
            rate hardly matters: steps have a largest size, and most would be of it.
        batch_size: sequences a step (not for `kurtosis`).
        seqlen: tokens a sequence.
        init: rotation to start from, drawn from `rotation.seed`; `none` is the identity.
        weights: `full` keeps weights in 16 bits while learning, `recipe` rounds them to the recipe's.
    """

    objective: Literal["network", "distill", "kurtosis"] = "network"
    steps: int = 100
    lr: float = 1.5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    momentum: float = 0.0
    max_grad_norm: float = 1.0
    batch_size: int = 8
    seqlen: int = 2048
    init: OnlineKind = "random_hadamard"
    weights: Literal["full", "recipe"] = "full"

    def __post_init__(self) -> None:
        SCHEMA.check(self)
        SCHEMA.check_least(self, {"steps": 1, "batch_size": 1, "seqlen": 2}, "rotation_learning.")
        for key in ("lr", "max_grad_norm"):
            if not 0 < getattr(self, key) < float("inf"):
                raise RecipeError(f"rotation_learning.{key}={getattr(self, key)}: give a number > 0")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"rotation_learning.momentum={self.momentum}: give a number in [0, 1)")
