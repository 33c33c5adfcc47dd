"""Logit distillation: the swapped model learns to predict what the model before would have predicted."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from attnswap.errors import ConfigError
from attnswap.surgery.body import base_of
from attnswap.surgery.entry import is_patched
from attnswap.training.head import IGNORED, CrossEntropy, RowLoss, in_blocks
from attnswap.training.observing import observing
from attnswap.training.regression import Errors
from attnswap.training.sections import LossSection
from attnswap.training.sinks import Sinks
from attnswap.training.teacher import Teacher
from attnswap.training.transfer import Transfer, transferring


class Distillation:
    """An objective for :func:`attnswap.training.chunked_loss` whose weights may change between steps.

    Args:
        teacher: Who is learned from; None: nobody, and only the cross entropy may have a weight.
        loss: The weights.
    """

    def __init__(self, teacher: Teacher | None, loss: LossSection) -> None:
        self.teacher = teacher
        self.loss = loss
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    @contextmanager
    def teach(self, model: PreTrainedModel, inputs: dict[str, Any], read: Tensor) -> Iterator["_Lesson"]:
        """Asks the teacher about one batch; see :class:`attnswap.training.loss.Objective`."""
        with ExitStack() as stack:
            lesson = _Lesson(self)
            check_looked_into(model, self.loss)
            if self.loss.taught and self.teacher is None:
                raise ConfigError("kl and transfer need a teacher: make one with attnswap.training.teacher_of")
            if self.loss.transfer and self.teacher is not None:
                lesson.transfer = stack.enter_context(transferring(self.teacher, model, inputs, read))
            elif self.loss.kl and self.teacher is not None:
                lesson.hidden = self.teacher.hidden(inputs)
            if self.loss.regression and is_patched(base_of(model)):
                lesson.errors = stack.enter_context(observing(model, Errors(read)))
            if self.loss.sinks:
                lesson.sinks = stack.enter_context(observing(model, Sinks(read)))
            yield lesson

    def count(self, name: str, count: int, values: Tensor) -> None:
        """Adds to what :meth:`means` returns: the sum of ``count`` values of one part of the loss."""
        total, number = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + values.detach().double().sum(), number + count

    def means(self) -> dict[str, float]:
        """Returns the mean of each part of the loss since the last call, in this process."""
        found = {name: float(total) / max(number, 1) for name, (total, number) in self._sums.items()}
        self._sums = {}
        return found


def check_looked_into(model: nn.Module, loss: LossSection) -> None:
    """Refuses a loss that looks into layers which are sharded or run twice.

    Raises:
        ConfigError: They are.
    """
    for module in model.modules() if loss.looks_inside else ():
        if isinstance(module, FSDPModule):
            raise ConfigError(
                "transfer, regression and sinks take gradients inside of layers, which FSDP has given away by then: "
                "launch such stages with DDP"
            )
        wrapped = type(module).__name__ == "CheckpointWrapper"  # accelerate's, around a layer
        if wrapped or getattr(module, "gradient_checkpointing", False) is True:
            raise ConfigError(
                "transfer, regression and sinks look at each layer as it runs, which gradient checkpointing runs "
                "twice: switch it off for such stages"
            )


class _Lesson:
    def __init__(self, objective: Distillation) -> None:
        self.objective = objective
        self.hidden: Tensor | None = None
        self.transfer: Transfer | None = None
        self.errors: Errors | None = None
        self.sinks: Sinks | None = None

    def of_rows(self, targets: Tensor, positions: tuple[Tensor, Tensor]) -> RowLoss | None:
        """See :class:`attnswap.training.loss.Lesson`."""
        if not self.objective.loss.of_logits:
            return None
        taught = None if self.hidden is None else self.hidden[positions]
        return _Rows(self.objective, targets, taught)

    def of_layers(self) -> Tensor | float:
        """See :class:`attnswap.training.loss.Lesson`."""
        loss, total = self.objective.loss, 0.0
        parts = {
            "transfer": None if self.transfer is None else self.transfer.distance(),
            "regression": None if self.errors is None else self.errors.mean(),
            "sinks": None if self.sinks is None else self.sinks.mean(),
        }
        for name, value in parts.items():
            if value is not None:
                self.objective.count(name, 1, value)
                total = total + getattr(loss, name) * value
        return total


class _Rows:
    """``kl * KL(teacher || student) + ce * NLL`` of rows of logits."""

    def __init__(self, objective: Distillation, targets: Tensor, taught: Tensor | None) -> None:
        self.objective, self.targets, self.taught = objective, targets, taught
        self.plain = CrossEntropy(targets)

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See :class:`attnswap.training.head.RowLoss`."""
        objective, loss, targets = self.objective, self.objective.loss, self.targets[rows]
        count = int((targets != IGNORED).sum())
        if self.taught is None:
            nll, gradient = self.plain(logits, rows)
            objective.count("ce", count, nll)
            return loss.ce * nll, gradient.mul_(loss.ce)
        assert objective.teacher is not None
        theirs = objective.teacher.logits(self.taught[rows])
        kl, nll, gradient = in_blocks(self._block, logits, theirs, targets)
        objective.count("kl", count, kl)
        objective.count("ce", count, nll)
        return loss.kl * kl + loss.ce * nll, gradient

    def _block(self, logits: Tensor, theirs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = self.objective.loss
        t = loss.temperature
        labelled = (targets != IGNORED).float()
        chosen = targets.clamp(min=0)[:, None]
        ours, log_p = logits.float(), (theirs.float() / t).log_softmax(-1)
        log_q = (ours / t).log_softmax(-1)
        p = log_p.exp()
        kl = (p * log_p.sub_(log_q)).sum(-1) * t**2 * labelled
        if t == 1:  # one softmax serves both
            nll = -log_q.gather(1, chosen)[:, 0]
            gradient = log_q.exp_().mul_(loss.kl + loss.ce).sub_(p, alpha=loss.kl)
        else:
            log_own = ours.log_softmax(-1)
            nll = -log_own.gather(1, chosen)[:, 0]
            gradient = log_q.exp_().sub_(p).mul_(loss.kl * t).add_(log_own.exp_(), alpha=loss.ce)
        gradient.scatter_add_(1, chosen, torch.full_like(nll[:, None], -loss.ce)).mul_(labelled[:, None])
        return kl, nll * labelled, gradient.to(logits.dtype)
