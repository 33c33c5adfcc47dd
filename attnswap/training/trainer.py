"""``transformers.Trainer`` with a parameter group for the swap, and losses averaged over tokens."""

import copy
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

import attnswap
from attnswap.distributed import full_tensor
from attnswap.errors import ConfigError
from attnswap.evaluation.result import write_atomically
from attnswap.training.loss import chunked_loss
from attnswap.training.movement import Movement, by_kind
from attnswap.training.stages import Stage, StagedWindows, Stages, staged_schedule
from attnswap.training.zero_gradient import SkipZeroGradientSteps


class SwapTrainer(Trainer):
    """Trains a patched model, or an unpatched one as the control.

    Use it inside :func:`attnswap.training.loss.chunked_loss`, with rows of ``input_ids``, ``position_ids`` and
    ``labels``. The evaluation loss is a mean over tokens, independent of the batches and the number of processes. The
    training loss is too, since ``average_tokens_across_devices`` is on by default.

    Args:
        *args: See ``Trainer``.
        swap_lr_multiplier: Ratio of the learning rate of the swap's parameters to that of the other parameters.
        stages: Stages with their own learning rates and windows. The callback :class:`attnswap.training.Stages` does
            everything else that stages need.
        windows: Number of windows in the data set for each stage, in order; empty: all stages use all windows.
        skip_steps: Says which steps need not be computed.
        **kwargs: See ``Trainer``.

    Attributes:
        model: The model, without the wrappers of Trainer.
        movement: Measures how far the swap's parameters moved since the trainer was created.
    """

    model: PreTrainedModel

    def __init__(
        self,
        *args: Any,
        swap_lr_multiplier: float = 10.0,
        stages: Sequence[Stage] = (),
        windows: Sequence[int] = (),
        skip_steps: SkipZeroGradientSteps | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the chunked loss accepts them, even if the model's own loss does not
        self.skip_steps = skip_steps
        if skip_steps is not None:
            self.add_callback(skip_steps)
        self.swap_lr_multiplier = swap_lr_multiplier
        self.stages, self.windows = list(stages), list(windows)
        if self.windows and len(self.windows) != len(self.stages):
            raise ConfigError(f"windows: give one number per stage: {len(self.windows)} for {len(self.stages)} stages")
        for section in (stage.section for stage in self.stages):
            if section.sequence_length is not None and not self.windows:
                raise ConfigError(
                    f'stages: "{section.name}" has a sequence_length, so the data set must contain the windows of each '
                    "stage, one stage after another: give the number of windows per stage as windows=[...]"
                )
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, Stages):
                callback.staged_trainer = bool(self.stages)
        self.movement = Movement(self.model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Creates the recipe's optimizer over :func:`attnswap.parameter_groups`.

        Raises:
            ConfigError: The optimizer is not installed, or makes its own parameter groups.
        """
        if self.optimizer is None:
            trained = self.model if model is None else model
            try:
                kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"training.optim: {error}") from None
            if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or (
                {"params", "model", "optimizer_dict"} & kwargs.keys()
            ):
                raise ConfigError(
                    f'training.optim: "{self.args.optim}" makes its own parameter groups, so that the swap would '
                    "not get its own learning rate: use adamw_torch, sgd or another plain optimizer"
                )
            groups = attnswap.parameter_groups(
                trained,
                lr=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                swap_lr_multiplier=self.swap_lr_multiplier,
            )
            self.optimizer = kind(groups, **kwargs)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Creates the recipe's learning rate schedule, which begins anew with each stage."""
        if not self.stages:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None
            self.lr_scheduler = staged_schedule(chosen, self.stages, self.args)
            self._created_lr_scheduler = True  # so that a second call of train() creates another one
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.windows:
            return super()._get_train_sampler(train_dataset)
        draws = [stage.steps * windows_per_step(self.args) for stage in self.stages]
        return StagedWindows(self.windows, draws, [self.args.seed + stage.index for stage in self.stages])

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Requests a checkpoint of the best weights, even if none is due at this step: the run ends with them."""
        best = super()._determine_best_metric(*args, **kwargs)
        if best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return best

    @property
    def loaded_step(self) -> int | None:
        """Step of the best checkpoint, which was loaded at the end; None if the weights are those of the last step."""
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            return None
        return int(Path(best).name.rpartition("-")[2])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Computes loss and gradients of a step, unless the gradients are known to be zero."""
        if self.skip_steps is not None and self.skip_steps.skip_step:
            return torch.zeros((), device=self.args.device)
        return super().training_step(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model. One that FSDP shards is saved as one model, except in checkpoints to resume from."""
        if not self.is_fsdp_enabled or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        state = {}
        for name, tensor in self.model.state_dict().items():
            full = full_tensor(tensor)
            if self.args.should_save:
                state[name] = full.detach().cpu()
        if self.args.should_save:
            sharded, self.model = self.model, _unsharded(self.model, state)
            try:
                self._save(output_dir)
            finally:
                self.model = sharded

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs, and adds the largest change of each kind of swap parameter."""
        if "loss" in logs:
            for kind, moved in by_kind(self.movement.measure(self.model)).items():
                logs[f"moved_{kind}"] = moved.largest
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluates, and replaces the mean over batches by the mean over tokens."""
        # Stages remove their loss from the model when training ends.
        ended = any(isinstance(c, Stages) and not c.installed for c in self.callback_handler.callbacks)
        with chunked_loss(self.model) if ended else nullcontext():
            output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        nll, tokens = (part.astype("float64").sum() for part in output.predictions)
        mean = {f"{metric_key_prefix}_loss": float(nll / tokens), f"{metric_key_prefix}_tokens": int(tokens)}
        return output._replace(metrics={**(output.metrics or {}), **mean})


def windows_per_step(args: TrainingArguments) -> int:
    """Returns the number of windows that all processes together read per optimizer step."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def _unsharded(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Returns an ordinary model with the state dict that was gathered from a sharded one."""
    kind = next(base for base in type(model).__mro__ if not issubclass(base, FSDPModule))
    with torch.device("meta"):
        plain = kind(copy.deepcopy(model.config))  # type: ignore[call-arg]
    assert isinstance(plain, PreTrainedModel)
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


class StepLog(TrainerCallback):
    """Writes every log entry to a file of JSON lines at once, and times the steps.

    Args:
        path: The file. A resumed run continues it from the step of its checkpoint.

    Attributes:
        seconds: Duration of each optimizer step of this process, by the number of steps before it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[int, float] = {}
        self._started = 0.0

    @property
    def runtime(self) -> float:
        """Seconds of fitting and training, summed over the run and its resumptions; a killed run does not count."""
        return sum(entry.get(kind, 0.0) for entry in self._entries() for kind in ("fit_runtime", "train_runtime"))

    def note(self, entry: dict[str, Any]) -> None:
        """Writes an entry that is not from the trainer's log."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _entries(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the entries after the checkpoint from which the run is resumed.

        Raises:
            ConfigError: The number of windows per step has changed, so that the run would not be the same.
        """
        windows = windows_per_step(args)
        before = [entry["windows_per_step"] for entry in self._entries() if "windows_per_step" in entry]
        if before and before[-1] != windows:
            raise ConfigError(
                f"training.resume_from_checkpoint: the run read {before[-1]} windows per step and would now read "
                f"{windows}: resume it with the same number of processes, or start anew with overwrite=true"
            )
        if state.is_world_process_zero and not before:
            self.note({"windows_per_step": windows})
        if state.is_world_process_zero and state.global_step:
            kept = [e for e in self._entries() if e.get("step", 0) <= state.global_step or "train_runtime" in e]
            write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to time the step."""
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Records the step's duration, and logs if a checkpoint or the end follows, so that no step is missing."""
        self.seconds[state.global_step - 1] = time.perf_counter() - self._started
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the newest entry, in the process of rank 0."""
        if state.is_world_process_zero:
            self.note(state.log_history[-1])
