"""Skip the training steps of a control whose gradients are known to be zero."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attnswap.surgery.body import base_of
from attnswap.training.config import TrainConfig
from attnswap.training.stages import Stage

CHECKED_STEPS = 3
"""Steps of each stage that are computed to see whether their gradients are zero."""


class SkipZeroGradientSteps(TrainerCallback):
    """Finds out whether a model that is its own teacher has zero gradients, and which steps can then be skipped.

    The KL divergence of a model from itself is 0, and so is its gradient, on any text, if student and teacher compute
    the same bits. Whether they do is seen in the first steps of each stage. If all of their gradients are 0, those of
    the stage's other steps are too, and :class:`attnswap.training.SwapTrainer` does not compute them. A run in which
    some gradient was not 0, or that was resumed, computes all of its steps.

    Args:
        stages: The stages of the run.

    Attributes:
        skipped: The steps that were not computed, counted from 0.
    """

    def __init__(self, stages: list[Stage]) -> None:
        self._stage_starts = {stage.first for stage in stages}
        self._checked = 0
        self._has_gradients = False
        self.skipped: list[int] = []

    @property
    def skip_step(self) -> bool:
        """Whether the current step can be skipped."""
        return not self._has_gradients and self._checked >= CHECKED_STEPS

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Switches itself off in a run that is resumed."""
        self._has_gradients = state.global_step > 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks again at the start of a stage, and records a step that will be skipped."""
        if state.global_step in self._stage_starts:
            self._checked = 0
        if self.skip_step:
            self.skipped.append(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks the gradients of a step that was computed."""
        if not self.skip_step:
            gradients = [p.grad for p in base_of(kwargs["model"]).parameters() if p.grad is not None]
            self._has_gradients |= not gradients or any(bool(gradient.any()) for gradient in gradients)
            self._checked += 1


def zero_gradient_steps(
    config: TrainConfig, plan: list[Stage], args: TrainingArguments
) -> SkipZeroGradientSteps | None:
    """Returns the callback for a recipe whose gradients may all be zero, or None for any other recipe."""
    is_own_teacher = config.swap is None and config.teacher is None and bool(plan)
    losses = [stage.section.loss for stage in plan]
    only_kl = all(loss.kl and not loss.ce and not loss.transfer for loss in losses)
    # Weight decay moves weights without a gradient, and a gradient scaler changes its scale in every step.
    plain = not args.weight_decay and not args.fp16 and args.world_size == 1
    return SkipZeroGradientSteps(plan) if is_own_teacher and only_kl and plain else None
