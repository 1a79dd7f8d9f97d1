"""`QATTrainer`: Hugging Face's Trainer for a prepared model; the losses and the steps of a run.

Its parts: `budget` counts the minutes, `checkpoints` writes and reads, `distributed` shards, `loss_check`
stops a run that explodes, `graphs` captures a step.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput

from ..errors import TrainingError
from ..recipe import Training
from . import checkpoints, distributed
from .budget import Budget, SaveAndStop
from .data import collate
from .graphs import GradientGraph, causal_logits
from .loss_check import LossCheck
from .losses import distillation_loss
from .optimizer import parameter_groups, rate
from .teacher import CachedTeacher

#: The name of the result of `QATTrainer.evaluate` in Trainer's history.
PERPLEXITIES = "eval_perplexities"


def training_arguments(
    training: Training, out: Path, world: int, seed: int, progress: bool, device: torch.device
) -> TrainingArguments:  # fmt: skip
    """Trainer's settings for a recipe.

    Args:
        out: directory of the checkpoints.
        world: number of processes, among which the sequences of a step are divided.
        seed: of Trainer's own draws.
        progress: show a bar.
        device: one of the kind to train on.

    Raises:
        TrainingError: the sequences of a step cannot be divided evenly.
    """
    share, rest = divmod(training.batch_size, world)
    micro = share if training.micro_batch == -1 else min(training.micro_batch, share)
    if rest or share % micro:
        raise TrainingError(
            f"training.batch_size={training.batch_size} is not a multiple of {world} processes times "
            f"training.micro_batch={training.micro_batch}; change one of the three"
        )
    on_gpu = device.type == "cuda"
    return TrainingArguments(
        output_dir=str(out), max_steps=training.steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro, max_grad_norm=training.max_grad_norm,
        bf16=on_gpu,
        # Logging a loss, or filtering NaN (`LossCheck` looks for them), waits for the GPU.
        use_cpu=not on_gpu, logging_steps=10 if on_gpu else 1, logging_nan_inf_filter=False,
        save_steps=max(1, training.steps // 10), save_total_limit=2, seed=seed % 2**32, report_to=[],
        disable_tqdm=not progress, remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )  # fmt: skip


class QATTrainer(Trainer):
    """Trains what `prepare` made trainable, against the teacher's logits.

    Latent weights and quantiser parameters have their own learning rates; checkpoints hold the trained
    parameters in safetensors. A loss that is not finite or explodes stops the run with `TrainingError`;
    checkpoints saved before stay. Each of several processes holds a part of the parameters (FSDP2), and the
    whole teacher.

    Args:
        model: prepared.
        teacher: the full-precision model in eval mode, or its stored probabilities; None for
            `loss: cross_entropy`.
        training: see `Training`.
        args: as for Trainer; `training_arguments` makes them from a `Training`.
        perplexities: measures the model, one figure a text; called when a checkpoint is written, and its
            time does not count.
        train_dataset: of `{"input_ids": int64 [seqlen]}`, for stored probabilities with `piece`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | CachedTeacher | None,
        training: Training,
        args: TrainingArguments,
        perplexities: Callable[[], list[float]] | None = None,
        **kwargs,
    ):
        super().__init__(model=model, args=args, data_collator=collate, **kwargs)
        if self.is_fsdp_enabled:
            distributed.exclude_packed(self.accelerator, model)
        self.model_accepts_loss_kwargs = False  # the loss is a mean; Trainer is to average accumulated ones
        self.training, self.perplexities = training, perplexities
        self.teacher = teacher.to(self.args.device) if isinstance(teacher, nn.Module) else teacher
        self.budget = Budget(training.minutes)
        self.loss_check = LossCheck(model, training, self.args.output_dir)
        self._graph: GradientGraph | None = None
        self._graphs = (
            self.args.device.type == "cuda"
            and self.args.world_size == 1
            and isinstance(teacher, nn.Module)  # stored probabilities are read from files
            and not training.gradient_checkpointing  # it asks a generator for its state
        )
        self.add_callback(SaveAndStop(self.budget, evaluate=perplexities is not None))
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Bar())
        if training.gradient_checkpointing:
            # transformers 5 has renamed it.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # which Trainer leaves out under FSDP2
            loss, output = self._loss(model, inputs["input_ids"], inputs.get("piece"))
        return (loss, output) if return_outputs else loss

    def _loss(self, model: nn.Module, ids: Tensor, piece: Tensor | None) -> tuple[Tensor, Any]:
        if self.training.loss == "cross_entropy":
            output = model(input_ids=ids, labels=ids, use_cache=False)
            return output.loss, output
        if isinstance(self.teacher, CachedTeacher):
            target = self.teacher(piece)
        else:
            with torch.no_grad():
                target = self.teacher(input_ids=ids, use_cache=False).logits
        output = model(input_ids=ids, use_cache=False)
        return distillation_loss(output.logits, target, kind=self.training.loss), output

    def _causal_loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """As `_loss`, with a teacher in memory, for a graph."""
        with torch.no_grad():
            target = causal_logits(self.teacher, ids)
        return distillation_loss(causal_logits(model, ids), target, kind=self.training.loss)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        graph = self._captured(model, inputs) if self._graphs else None
        if graph is None:
            loss = super().training_step(model, inputs, *args, **kwargs)
        else:
            loss = graph.run(self._prepare_inputs(inputs)["input_ids"])
        if self.args.world_size == 1 and loss.is_cuda:
            self.budget.minutes = self.budget.clock()
            self.loss_check.defer(loss, self.state.global_step)
            return loss
        # Learning rates and the end follow the clock, which must be the same in all processes.
        here = loss.new_tensor([[loss.detach(), self.budget.clock()]], dtype=torch.float64)
        value, self.budget.minutes = self.accelerator.gather(here).mean(0).tolist()
        self.loss_check.check(value, self.state.global_step + 1)
        return loss

    def _captured(self, model: nn.Module, inputs: dict[str, Tensor]) -> GradientGraph | None:
        """A step's passes as a CUDA graph; None if they cannot be captured."""
        if self._graph is None:
            parts = self.args.gradient_accumulation_steps

            def loss(ids: Tensor) -> Tensor:
                with self.accelerator.autocast():
                    return self._causal_loss(model, ids) / parts

            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            model.train()
            ids = self._prepare_inputs(inputs)["input_ids"]
            try:
                self._graph = GradientGraph(loss, trained, ids, accumulate=parts > 1)
            except RuntimeError as error:
                self._graphs = False
                reason = str(error).splitlines()[0]
                warnings.warn(f"training runs without a CUDA graph, and slower: {reason}", stacklevel=2)
        return self._graph

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(model if model is not None else self.model, self.training)
            self.optimizer = torch.optim.AdamW(groups, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: rate(self.training, self.budget.share(step, num_training_steps))
            )
        return self.lr_scheduler

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = distributed.set_up_fsdp(self.accelerator.state)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The perplexities, into Trainer's history."""
        if self.perplexities is None:
            return super().evaluate(*args, **kwargs)
        with self.budget.paused():
            metrics = {PERPLEXITIES: self.perplexities()}
        self.log(metrics)
        self.control.should_evaluate = False
        return metrics

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is not None:
            checkpoints.check_readable(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        state = checkpoints.trained_state(self.model, keep=self.args.should_save)
        self._write(functools.partial(self._save, output_dir, state))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.loss_check.check_deferred(self.state.global_step)
        folder = checkpoints.checkpoint_folder(Path(self.args.output_dir), self.state.global_step)
        try:
            self._write(functools.partial(super()._save_checkpoint, model, trial))
            self._write(functools.partial(self._mark_whole, folder))
        except TrainingError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _write(self, write: Callable[[], None]) -> None:
        checkpoints.write_together(write, self.args.output_dir, self.state.global_step)

    def _mark_whole(self, folder: Path) -> None:
        if self.args.should_save:
            checkpoints.mark_whole(folder, self.args.world_size)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            state = state_dict if state_dict is not None else checkpoints.trained_state(self.model, keep=True)
            checkpoints.save_trained(state, Path(output_dir or self.args.output_dir), self.budget.minutes)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        distributed.save_optimizer(self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        checkpoints.check_processes(checkpoint, self.args.world_size)
        checkpoints.load_trained(model if model is not None else self.model, checkpoint)
        self.budget.resume(checkpoints.spent_minutes(checkpoint))


class _Bar(ProgressCallback):
    """Trainer's bar followed by the loss, instead of a line for each step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", refresh=False)
