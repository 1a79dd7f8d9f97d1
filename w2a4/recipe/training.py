"""The part of a recipe that says how a prepared model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RecipeError
from .limits import SCHEMA


@dataclass(frozen=True)
class Training:
    """How `w2a4 train` trains a prepared model (RCP, see `docs/method.md`).

    Attributes:
        route: `end_to_end`, or `block`: each decoder layer alone against the full-precision layer's output,
            on the calibration windows; then loss, data, seqlen, micro_batch and minutes do not matter, and
            steps are those of a layer.
        init: what training begins with: `gptq`, `lloyd` (round to nearest) or `minmax`.
        block_steps: end to end, so many steps of each decoder layer alone come first, as with the route
            `block`; `minutes` does not count them.
        keep_codes: begin with the codes of the fit, which is best for a short run; without, latent weights
            begin at their full-precision values, which GPTQ's codes are not nearest to.
        grid: of a codebook: `ldp`, learned levels (four or eight a group); `uniform`, learned ends and equal
            steps between; or `minmax`, equal steps between the least and the greatest weight, wherever these
            move.
        learn_act_clip: whether the clips of the activations are learned.
        loss: `cakld` (both KL divergences, weighted by the teacher's confidence), `kl`
            (teacher to student) or `cross_entropy` (no teacher).
        teacher_top: 0 keeps the teacher in memory; else only its so many most probable tokens at every
            position are kept, on disk, and the probability of the rest.
        steps: optimiser steps.
        batch_size, seqlen: sequences a step, over all processes and accumulations, and tokens in each.
        micro_batch: sequences in one forward pass; -1 is all that a process has.
        lr: of the latent weights, AdamW, for a matrix whose weights have a root mean square of 1/16; in
            proportion for others.
        quantizer_lr: of levels and clips; of uniform steps, relative to their size.
        schedule: of both rates after the warm-up.
        warmup: share of the steps.
        weight_decay: of the latent weights.
        max_grad_norm: gradients are scaled down to this norm.
        gradient_checkpointing: recompute layers in the backward pass: less memory, a third more time.
        data: `general`, `builtin`, a text file, `hub:NAME`, or `self`: the teacher's own continuations.
        minutes: stop (with the schedule's end) when this much time is over; 0 is no limit.
    """

    route: Literal["end_to_end", "block"] = "end_to_end"
    init: Literal["gptq", "lloyd", "minmax"] = "gptq"
    block_steps: int = 0
    keep_codes: bool = True
    grid: Literal["ldp", "uniform", "minmax"] = "ldp"
    learn_act_clip: bool = True
    loss: Literal["cakld", "kl", "cross_entropy"] = "cakld"
    teacher_top: int = 0
    steps: int = 1600
    batch_size: int = 8
    seqlen: int = 1024
    micro_batch: int = 1
    lr: float = 5e-5
    quantizer_lr: float = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = True
    data: str = "general"
    minutes: float = 0.0

    def __post_init__(self) -> None:
        SCHEMA.check(self)
        least = {"teacher_top": 0, "block_steps": 0, "steps": 1, "batch_size": 1, "seqlen": 2}
        SCHEMA.check_least(self, least, "training.")
        if self.micro_batch != -1 and self.micro_batch < 1:
            raise RecipeError(f"training.micro_batch={self.micro_batch}: give -1 or a number >= 1")
        for key in ("lr", "quantizer_lr", "weight_decay", "minutes"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise RecipeError(f"training.{key}={getattr(self, key)}: give a number >= 0")
        if not 0 <= self.warmup < 1:
            raise RecipeError(f"training.warmup={self.warmup}: give a number in [0, 1)")
        if not self.max_grad_norm > 0:
            raise RecipeError(f"training.max_grad_norm={self.max_grad_norm}: give a number > 0")
