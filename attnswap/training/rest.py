"""A control that learns from itself alone has nothing to learn, and need not be asked in every step."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attnswap.surgery.body import base_of
from attnswap.training.config import TrainConfig
from attnswap.training.stages import Stage

TRIED = 3
"""Steps of each stage that are computed before the rest of it is taken to be like them."""


class AtRest(TrainerCallback):
    """Notices that a model stays where it is.

    The divergence of a model from itself is 0 and so is its gradient, on any text, if student and teacher compute
    alike to the last bit. Whether they do is seen in the first steps of each stage: where their gradients are 0, so
    are those of the others, and :class:`attnswap.training.SwapTrainer` does not compute them. A model that moved
    once, or a run that is resumed, is computed to its end.

    Args:
        stages: The stages of the run.

    Attributes:
        left: The steps that were not computed, counted from 0.
    """

    def __init__(self, stages: list[Stage]) -> None:
        self._starts = {stage.first for stage in stages}
        self._still = 0
        self._moved = False
        self.left: list[int] = []

    @property
    def here(self) -> bool:
        """Whether the step to come need not be computed."""
        return not self._moved and self._still >= TRIED

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives up on a run that is resumed."""
        self._moved = state.global_step > 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts to count anew where a stage starts."""
        if state.global_step in self._starts:
            self._still = 0
        if self.here:
            self.left.append(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Looks at the gradients of a step that was computed."""
        if not self.here:
            gradients = [p.grad for p in base_of(kwargs["model"]).parameters() if p.grad is not None]
            self._moved |= not gradients or any(bool(gradient.any()) for gradient in gradients)
            self._still += 1


def at_rest(config: TrainConfig, plan: list[Stage], args: TrainingArguments) -> AtRest | None:
    """Returns what notices that a recipe's model stays where it is, or None if it may learn something."""
    taught_by_itself = config.swap is None and config.teacher is None and bool(plan)
    losses = [stage.section.loss for stage in plan]
    alone = all(loss.kl and not loss.ce and not loss.transfer for loss in losses)
    plain = not args.weight_decay and not args.fp16 and args.world_size == 1
    return AtRest(plan) if taught_by_itself and alone and plain else None
