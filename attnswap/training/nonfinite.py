"""Skip optimizer steps whose loss or gradient is not finite."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attnswap.distributed import all_reduce_max, to_local
from attnswap.errors import NumericsError
from attnswap.surgery.body import base_of
from attnswap.training.watch import Watch


class SkipNonFinite(TrainerCallback):
    """Skips an optimizer step if its loss or a gradient is not finite. The third such step in a row ends the run.

    A skipped step changes neither the weights nor the optimizer's moments. After the first one, the attention of all
    layers is watched, so that the error can name the layer and head where the first non-finite number appeared. Details
    are written to ``nonfinite-step-N.json`` in the run's directory.

    Args:
        patience: Number of such steps in a row that ends the run.

    Attributes:
        skipped: The skipped steps, counted from 1.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.skipped: list[int] = []
        self._in_a_row = 0
        self._loss_is_finite: Tensor | None = None
        self._hook: Any = None
        self._watch: Watch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to check the model's losses, and reads the skipped steps of a run that is resumed."""
        log: list[dict[str, Any]] = state.log_history
        known = [entry["skipped_steps"] for entry in log if isinstance(entry.get("skipped_steps"), list)]
        self.skipped = list(known[-1]) if known else []
        self._hook = kwargs["model"].register_forward_hook(self._check_loss)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the gradients if the loss or one of them is not finite, so that the optimizer changes nothing.

        Raises:
            NumericsError: This is the third such step in a row.
        """
        optimizer, step = kwargs["optimizer"], state.global_step + 1
        scaled = getattr(optimizer, "scaler", None) is not None  # the gradient scaler of fp16 skips such steps itself
        groups = [] if scaled else optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        finite = self._all_finite(gradients, args.device)
        self._loss_is_finite = None
        if finite:
            self._in_a_row = 0
            self._stop_watching()
            return
        if not scaled:
            optimizer.zero_grad(set_to_none=True)
        self.skipped.append(step)
        self._in_a_row += 1
        if self._in_a_row >= self.patience:
            self._raise(args, step)
        self._stop_watching()
        self._watch = Watch(base_of(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs before a checkpoint is saved, so that its log has the skipped steps."""
        if self.skipped and control.should_save:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Adds the skipped steps to the log entry."""
        log: list[dict[str, Any]] = state.log_history
        if self.skipped and log:
            log[-1]["skipped_steps"] = list(self.skipped)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops to check losses and attention."""
        self._stop_watching()
        self._hook.remove()

    def _check_loss(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else None
        if model.training and isinstance(loss, Tensor):
            finite = torch.isfinite(loss.detach()).all()
            self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite

    def _all_finite(self, gradients: list[Tensor], device: torch.device) -> bool:
        local = [to_local(gradient) for gradient in gradients]
        finite = torch.ones((), device=device, dtype=torch.bool)
        if self._loss_is_finite is not None:
            finite = finite & self._loss_is_finite.to(device)
        if local:
            norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(local)])
            finite = finite & torch.isfinite(norms).all()
        return not all_reduce_max(int(~finite), device)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _raise(self, args: TrainingArguments, step: int) -> None:
        """Writes the report and raises NumericsError."""
        watch = self._watch
        found = {"steps": self.skipped[-self._in_a_row :], **(watch.report() if watch else {})}
        suffix = "" if args.process_index == 0 else f"-rank{args.process_index}"
        file = Path(args.output_dir or ".") / f"nonfinite-step-{step}{suffix}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        self._stop_watching()
        self._hook.remove()
        steps = ", ".join(map(str, found["steps"]))
        raise NumericsError(
            f"the loss or a gradient was not finite in {self._in_a_row} steps in a row ({steps}); "
            f"{watch.summary() if watch else 'the layer was not found'} (see {file}). The weights are those of step "
            f"{found['steps'][0] - 1}: lower the learning rate or optimizer.swap_lr_multiplier, or start at a smaller "
            "ramp"
        )
