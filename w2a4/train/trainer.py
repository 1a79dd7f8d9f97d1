"""`QATTrainer`: Hugging Face's Trainer for a prepared model, with a full-precision teacher."""

from __future__ import annotations

import functools
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, save_fsdp_optimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..errors import CalibrationError, TrainingError
from ..format.files import write_json
from ..format.linear import W8Embedding
from ..recipe import Training
from .checkpoints import WEIGHTS, WHOLE, check_processes, check_readable, damaged
from .graphs import GradientGraph, causal_logits
from .linear import fake_quant_linears
from .losses import distillation_loss
from .optimizer import parameter_groups, rate
from .processes import agree
from .teacher import CachedTeacher

#: What `QATTrainer.evaluate` calls its result in Trainer's history.
PERPLEXITY = "eval_perplexity"

#: One of these is in the RuntimeError that torch.save makes of a full disk.
_FILE_WRITER = ("inline_container", "iostream", "StreamWriter")

#: A run limited in time saves after each tenth of it, but not more often, nor seldomer, than so many minutes.
SAVE_MINUTES = 1.0, 10.0

#: A loss this many times that of the first step means that training has blown up.
EXPLODED = 10.0


class Windows(Dataset):
    """Windows of a token stream: item i is the same whatever was drawn before, so that runs can be resumed.

    Every pass over the text cuts it at another offset and shuffles the pieces.

    Args:
        stream: int64 `[tokens]`.
        seqlen: tokens in a window.
        count: windows in all.
        recut: without it every pass cuts alike, so that what a teacher said of a piece can be kept.
    """

    def __init__(self, stream: Tensor, seqlen: int, count: int, seed: int = 0, recut: bool = True):
        if len(stream) < 2 * seqlen:
            raise CalibrationError(
                f"the training text has {len(stream)} tokens; windows of seqlen={seqlen} need at least "
                f"{2 * seqlen}: give a longer text or a smaller training.seqlen"
            )
        self.stream, self.seqlen, self.count, self.seed, self.recut = stream, seqlen, count, seed, recut
        self.in_pass = len(stream) // seqlen - 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, within = divmod(index, self.in_pass)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + number)
        offset = int(torch.randint(self.seqlen, (1,), generator=generator)) * self.recut
        piece = torch.randperm(self.in_pass, generator=generator)[within]
        start = offset + int(piece) * self.seqlen
        return {"input_ids": self.stream[start : start + self.seqlen], "piece": piece}

    def pieces(self) -> Tensor:
        """All that a pass without `recut` is made of, int64 `[in_pass, seqlen]`."""
        return self.stream[: self.in_pass * self.seqlen].view(-1, self.seqlen)


class QATTrainer(Trainer):
    """Trains what `prepare` made trainable, against the teacher's logits.

    Latent weights and quantiser parameters have their own learning rates; checkpoints hold the model's
    state in safetensors. A loss that is not finite or explodes stops the run with `TrainingError`;
    checkpoints saved before stay. Of several processes each holds a part of the parameters (FSDP2), and the
    whole teacher.

    Args:
        model: prepared.
        teacher: the full-precision model, in eval mode, or its words on every piece; None for
            `loss: cross_entropy`.
        training: see `Training`.
        args: as for Trainer; `training_arguments` makes them from a `Training`.
        watch: gives the model's perplexity; asked when a checkpoint is written. Its time is not training's.
        train_dataset: of `{"input_ids": int64 [seqlen]}`, for a cached teacher with `piece`.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module | CachedTeacher | None,
        training: Training,
        args: TrainingArguments,
        watch: Callable[[], float] | None = None,
        **kwargs,
    ):
        super().__init__(model=model, args=args, data_collator=_collate, **kwargs)
        if self.is_fsdp_enabled:
            # Not trained and small; FSDP of torch 2.11 takes every parameter for one of floats.
            packed = [module for module in model.modules() if isinstance(module, W8Embedding)]
            self.accelerator.state.fsdp_plugin.ignored_modules = packed
        self.model_accepts_loss_kwargs = False  # the loss is a mean; Trainer is to average accumulated ones
        self.training, self.watch = training, watch
        self.teacher = teacher.to(self.args.device) if isinstance(teacher, nn.Module) else teacher
        self.started, self.spent, self._minutes = time.monotonic(), 0.0, 0.0
        self.first_loss: float | None = None
        #: Of the last step, if it was not looked at yet, for which a GPU would have to be waited for.
        self._unseen: Tensor | None = None
        self._graph: GradientGraph | None = None
        self._graphs = (
            self.args.device.type == "cuda"
            and self.args.world_size == 1
            and isinstance(teacher, nn.Module)  # another one reads files
            and not training.gradient_checkpointing  # it asks a generator for its state
        )
        self.add_callback(_Clock(self))
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Bar())
        if training.gradient_checkpointing:
            # transformers 5 has renamed it.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if wanted and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate leaves FSDP to accelerators; PyTorch has it on CPUs, over gloo.
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            # Parameters are gathered unrounded: codes and levels are made of them. Autocast does the rest.
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What `watch` says, in Trainer's history."""
        if self.watch is None:
            return super().evaluate(*args, **kwargs)
        begun = time.monotonic()
        metrics = {PERPLEXITY: self.watch()}
        self.started += time.monotonic() - begun
        self.log(metrics)
        self.control.should_evaluate = False
        return metrics

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        if resume_from_checkpoint is not None:
            check_readable(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

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
        # Rates and the end follow the clock, which must be the same in all processes.
        if self.args.world_size == 1 and loss.is_cuda:
            self._minutes, before, self._unseen = self._clock(), self._unseen, loss.detach()
            if before is not None:
                self._check(float(before), self.state.global_step)
            return loss
        here = loss.new_tensor([[loss.detach(), self._clock()]], dtype=torch.float64)
        value, self._minutes = self.accelerator.gather(here).mean(0).tolist()
        self._check(value, self.state.global_step + 1)
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
                warnings.warn(f"training goes without a CUDA graph, and slower: {reason}", stacklevel=2)
        return self._graph

    def _check(self, loss: float, step: int) -> None:
        """Raise TrainingError if a step's loss is not finite, or many times the first."""
        if self.first_loss is None and math.isfinite(loss):
            self.first_loss = loss
        if not math.isfinite(loss) or loss > EXPLODED * (self.first_loss or math.inf):
            raise TrainingError(
                f"step {step}: the loss is {loss:.4g}{self._culprit()}; lower "
                f"training.lr (now {self.training.lr:g}) or training.quantizer_lr (now "
                f"{self.training.quantizer_lr:g}); checkpoints saved before stay in {self.args.output_dir!r}"
            )

    def _culprit(self) -> str:
        return agree(self._not_finite()) or ""

    def _not_finite(self) -> str | None:
        """What this process holds that is not finite."""
        for what, values in (
            ("", self.model.named_parameters()),
            (
                "the gradient of ",
                ((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None),
            ),
        ):
            for name, value in values:
                value = value.to_local() if isinstance(value, DTensor) else value
                if not bool(torch.isfinite(value).all()):
                    return f", {what}{name} holds NaN or infinity"
        return None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = parameter_groups(model if model is not None else self.model, self.training)
            self.optimizer = torch.optim.AdamW(groups, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            optimizer = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: rate(self.training, self.progress(step, num_training_steps))
            )
        return self.lr_scheduler

    def minutes(self) -> float:
        """Spent on this run up to its last step, interrupted parts included; the same in all processes."""
        return self._minutes

    def _clock(self) -> float:
        return self.spent + (time.monotonic() - self.started) / 60

    def progress(self, step: int, steps: int) -> float:
        """The share of the run that is over, by steps or by time, whichever ends it first."""
        limit = self.training.minutes
        return max(step / steps, self.minutes() / limit if limit else 0.0)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def trained_state(self) -> dict[str, Tensor]:
        """The trained parameters, whole; all processes must ask, and the main one gets them."""
        state, whole = self.model.state_dict(), {}
        for name in _trained(self.model):
            tensor = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
            if self.args.should_save:
                # Clips are shared by linears of one input, and a file's tensors must not be.
                whole[name] = tensor.cpu().clone() if tensor.numel() == 1 else tensor.contiguous().cpu()
        return whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._write(functools.partial(self._save, output_dir, self.trained_state()))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._unseen is not None:
            before, self._unseen = self._unseen, None
            self._check(float(before), self.state.global_step)
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            self._write(functools.partial(super()._save_checkpoint, model, trial))
            self._write(functools.partial(self._mark_whole, folder))
        except TrainingError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _mark_whole(self, folder: Path) -> None:
        if self.args.should_save:
            sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
            write_json(folder / WHOLE, {"processes": self.args.world_size, "sizes": sizes})

    def _write(self, write: Callable[[], None]) -> None:
        """Call `write` in all processes, and if one of them cannot, raise TrainingError in all."""
        problem = None
        try:
            write()
        except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
            problem = _write_failure(error)
            if problem is None:
                raise
        problem = agree(problem)
        if problem is not None:
            raise TrainingError(
                f"step {self.state.global_step}: cannot write a checkpoint in {self.args.output_dir!r}: "
                f"{problem}; mend that and repeat the command, which goes on from the one before"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = state_dict if state_dict is not None else self.trained_state()
        save_file(state, folder / WEIGHTS, {"minutes": f"{self.minutes():.3f}"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the weights a second time, with those that are frozen.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_processes(Path(resume_from_checkpoint), self.args.world_size)
        load_trained(model if model is not None else self.model, Path(resume_from_checkpoint))
        self.spent = self._minutes = _minutes(Path(resume_from_checkpoint))


class _Bar(ProgressCallback):
    """Trainer's bar with the loss behind it, instead of a line for each step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4f}", refresh=False)


class _Clock(TrainerCallback):
    """Saves and stops in time, if the run is limited in time: its steps may never be counted out.

    And has the model measured whenever it is saved.
    """

    def __init__(self, trainer: QATTrainer):
        self.trainer, self.saved = trainer, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = self.trainer.minutes()

    def on_save(self, args, state, control, **kwargs):
        self.saved = self.trainer.minutes()

    def on_step_end(self, args, state, control, **kwargs):
        limit, now = self.trainer.training.minutes, self.trainer.minutes()
        if limit and now >= limit:
            control.should_save = control.should_training_stop = True
        elif limit and now - self.saved >= save_interval(limit):
            control.should_save = True
        control.should_evaluate = control.should_save and self.trainer.watch is not None


def _write_failure(error: BaseException) -> str | None:
    """What kept a file from being written; None if it was something else."""
    if isinstance(error, CheckpointException):  # all processes' errors, each with its stack
        error = next(iter(error.failures.values()))[0]
    told = " ".join(str(error).split())
    if not isinstance(error, RuntimeError):
        return told
    full = any(word in told for word in _FILE_WRITER)
    return f"torch.save could not write, is the disk full? ({told})" if full else None


def save_interval(limit: float) -> float:
    """Minutes between checkpoints of a run that is limited to so many."""
    shortest, longest = SAVE_MINUTES
    return min(max(limit / 10, shortest), longest)


def training_arguments(
    training: Training, out: Path, world: int, seed: int, progress: bool, device: torch.device
) -> TrainingArguments:  # fmt: skip
    """Trainer's settings for a recipe: `world` processes share each step's sequences."""
    share, rest = divmod(training.batch_size, world)
    micro = share if training.micro_batch == -1 else min(training.micro_batch, share)
    if rest or share % micro:
        raise TrainingError(
            f"training.batch_size={training.batch_size} is not a multiple of {world} processes times "
            f"training.micro_batch={training.micro_batch}"
        )
    on_gpu = device.type == "cuda"
    return TrainingArguments(
        output_dir=str(out), max_steps=training.steps, per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro, max_grad_norm=training.max_grad_norm,
        bf16=on_gpu,
        # A loss that is logged, or looked at for NaN (`_check` does that), is waited for.
        use_cpu=not on_gpu, logging_steps=10 if on_gpu else 1, logging_nan_inf_filter=False,
        save_steps=max(1, training.steps // 10), save_total_limit=2, seed=seed % 2**32, report_to=[],
        disable_tqdm=not progress, remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
    )  # fmt: skip


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Load the trained parameters of a checkpoint, which must be those of this model."""
    try:
        state, names = load_file(checkpoint / WEIGHTS), set(_trained(model))
    except (OSError, SafetensorError) as error:
        raise damaged(checkpoint / WEIGHTS, error) from None
    strange = sorted(names ^ set(state))
    if strange:
        raise TrainingError(
            f"{str(checkpoint)!r} is of another model or recipe: {strange[0]!r} does not match"
        )
    try:
        # Sharded parameters take their part of it.
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    except RuntimeError as error:
        raise TrainingError(f"{str(checkpoint)!r} is of another model or recipe: {error}") from None


def _trained(model: nn.Module) -> list[str]:
    return [
        f"{name}.{key}" for name, m in fake_quant_linears(model).items() for key, _ in m.named_parameters()
    ]


def _minutes(checkpoint: Path) -> float:
    from safetensors import safe_open

    with safe_open(checkpoint / WEIGHTS, "pt") as file:
        return float((file.metadata() or {}).get("minutes", 0))


def _collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}
