"""Keep a loss or gradient that is not a number away from the weights."""

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
    """Leaves out an optimizer step whose loss or gradient is not finite; the third in a row ends the run.

    The weights, and the optimizer's moments, stay bit for bit what they were. After a first such step the next ones
    are watched, so that the error can say in which layer and head it began. It is written to
    ``nonfinite-step-N.json`` in the run's directory.

    Args:
        patience: Steps in a row that end the run.

    Attributes:
        skipped: The steps that were left out.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self.skipped: list[int] = []
        self._row = 0
        self._loss_is_finite: Tensor | None = None
        self._hook: Any = None
        self._watch: Watch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to look at the model's losses, and remembers what a run that is resumed has left out."""
        log: list[dict[str, Any]] = state.log_history
        known = [entry["skipped_steps"] for entry in log if isinstance(entry.get("skipped_steps"), list)]
        self.skipped = list(known[-1]) if known else []
        self._hook = kwargs["model"].register_forward_hook(self._look)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the gradients away if they or a loss are not finite, so that the optimizer has nothing to do.

        Raises:
            NumericsError: For the third time in a row.
        """
        optimizer, step = kwargs["optimizer"], state.global_step + 1
        scaled = getattr(optimizer, "scaler", None) is not None  # fp16: that leaves out such gradients itself
        groups = [] if scaled else optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        fine = self._all_finite(gradients, args.device)
        self._loss_is_finite = None
        if fine:
            self._row = 0
            self._stop_watching()
            return
        if not scaled:
            optimizer.zero_grad(set_to_none=True)
        self.skipped.append(step)
        self._row += 1
        if self._row >= self.patience:
            self._end(args, step)
        self._stop_watching()
        self._watch = Watch(base_of(kwargs["model"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sees that a checkpoint knows which steps were left out before it."""
        if self.skipped and control.should_save:
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Notes which steps were left out so far."""
        log: list[dict[str, Any]] = state.log_history
        if self.skipped and log:
            log[-1]["skipped_steps"] = list(self.skipped)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops looking."""
        self._stop_watching()
        self._hook.remove()

    def _look(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else None
        if model.training and isinstance(loss, Tensor):
            finite = torch.isfinite(loss.detach()).all()
            self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite

    def _all_finite(self, gradients: list[Tensor], device: torch.device) -> bool:
        local = [to_local(gradient) for gradient in gradients]
        fine = torch.ones((), device=device, dtype=torch.bool)
        if self._loss_is_finite is not None:
            fine = fine & self._loss_is_finite.to(device)
        if local:
            norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(local)])
            fine = fine & torch.isfinite(norms).all()
        return not all_reduce_max(int(~fine), device)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _end(self, args: TrainingArguments, step: int) -> None:
        watch = self._watch
        found = {"steps": self.skipped[-self._row :], **(watch.report() if watch else {})}
        suffix = "" if args.process_index == 0 else f"-rank{args.process_index}"
        file = Path(args.output_dir or ".") / f"nonfinite-step-{step}{suffix}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        self._stop_watching()
        self._hook.remove()
        steps = ", ".join(map(str, found["steps"]))
        raise NumericsError(
            f"the loss or a gradient was not finite in {self._row} steps in a row ({steps}); "
            f"{watch.summary() if watch else 'its origin was not found'} (see {file}). The weights are those of step "
            f"{found['steps'][0] - 1}: lower the learning rate or optimizer.swap_lr_multiplier, or start the swap at a "
            "smaller ramp"
        )
