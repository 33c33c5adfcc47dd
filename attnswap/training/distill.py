"""Distillation: the patched model learns from a teacher, such as the model before patching."""

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
from attnswap.training.chunked_head import IGNORED, CrossEntropy, RowLoss, in_blocks
from attnswap.training.observing import observing
from attnswap.training.regression import RegressionLoss
from attnswap.training.sections import LossSection
from attnswap.training.sinks import SinkLoss
from attnswap.training.teacher import Teacher
from attnswap.training.transfer import Transfer, transferring


class Distillation:
    """A training objective for :func:`attnswap.training.chunked_loss`. Its loss weights may change between steps.

    Args:
        teacher: The teacher; None if neither ``kl`` nor ``transfer`` has a weight.
        loss: The loss weights.
    """

    def __init__(self, teacher: Teacher | None, loss: LossSection) -> None:
        self.teacher = teacher
        self.loss = loss
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    @contextmanager
    def for_batch(
        self, model: PreTrainedModel, inputs: dict[str, Any], text_mask: Tensor
    ) -> Iterator["_DistillationBatch"]:
        """Runs the teacher on one batch; see :class:`attnswap.training.loss.Objective`."""
        with ExitStack() as stack:
            batch = _DistillationBatch(self)
            check_observable(model, self.loss)
            if self.loss.needs_teacher and self.teacher is None:
                raise ConfigError("kl and transfer need a teacher: make one with attnswap.training.teacher_of")
            if self.loss.transfer and self.teacher is not None:
                batch.transfer = stack.enter_context(transferring(self.teacher, model, inputs, text_mask))
            elif self.loss.kl and self.teacher is not None:
                batch.teacher_hidden = self.teacher.hidden(inputs)
            if self.loss.regression and is_patched(base_of(model)):
                batch.regression = stack.enter_context(observing(model, RegressionLoss(text_mask)))
            if self.loss.sinks:
                batch.sinks = stack.enter_context(observing(model, SinkLoss(text_mask)))
            yield batch

    def record(self, name: str, count: int, values: Tensor) -> None:
        """Records one part of the loss for :meth:`means`.

        Args:
            name: Name of the part.
            count: Number of tokens or batches that the values are of.
            values: The values, or their sum.
        """
        total, number = self._sums.get(name, (0.0, 0))
        self._sums[name] = total + values.detach().double().sum(), number + count

    def means(self) -> dict[str, float]:
        """Returns the mean of each recorded part of the loss since the last call, in this process."""
        found = {name: float(total) / max(number, 1) for name, (total, number) in self._sums.items()}
        self._sums = {}
        return found


def check_observable(model: nn.Module, loss: LossSection) -> None:
    """Refuses a loss on the inside of layers, if the layers are sharded or are run twice.

    Raises:
        ConfigError: The model is sharded by FSDP, or gradient checkpointing is on.
    """
    for module in model.modules() if loss.observes_layers else ():
        if isinstance(module, FSDPModule):
            raise ConfigError(
                "the losses transfer, regression and sinks send gradients into the inside of layers, whose weights "
                "FSDP has freed by then: launch such stages with DDP"
            )
        wrapped = type(module).__name__ == "CheckpointWrapper"  # how accelerate checkpoints a layer
        if wrapped or getattr(module, "gradient_checkpointing", False) is True:
            raise ConfigError(
                "the losses transfer, regression and sinks observe the forward of each layer, which gradient "
                "checkpointing runs twice: switch it off for such stages"
            )


class _DistillationBatch:
    def __init__(self, objective: Distillation) -> None:
        self.objective = objective
        self.teacher_hidden: Tensor | None = None
        self.transfer: Transfer | None = None
        self.regression: RegressionLoss | None = None
        self.sinks: SinkLoss | None = None

    def row_loss(self, targets: Tensor, positions: tuple[Tensor, Tensor]) -> RowLoss | None:
        """See :class:`attnswap.training.loss.BatchObjective`."""
        if not self.objective.loss.uses_logits:
            return None
        hidden = None if self.teacher_hidden is None else self.teacher_hidden[positions]
        return _DistillationRows(self.objective, targets, hidden)

    def layer_loss(self) -> Tensor | float:
        """See :class:`attnswap.training.loss.BatchObjective`."""
        loss, total = self.objective.loss, 0.0
        parts = {
            "transfer": None if self.transfer is None else self.transfer.distance(),
            "regression": None if self.regression is None else self.regression.mean(),
            "sinks": None if self.sinks is None else self.sinks.mean(),
        }
        for name, value in parts.items():
            if value is not None:
                self.objective.record(name, 1, value)
                total = total + getattr(loss, name) * value
        return total


class _DistillationRows:
    """``kl * KL(teacher || student) + ce * NLL`` of rows of logits."""

    def __init__(self, objective: Distillation, targets: Tensor, teacher_hidden: Tensor | None) -> None:
        self.objective, self.targets, self.teacher_hidden = objective, targets, teacher_hidden
        self.cross_entropy = CrossEntropy(targets)

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See :class:`attnswap.training.chunked_head.RowLoss`."""
        objective, loss, targets = self.objective, self.objective.loss, self.targets[rows]
        count = int((targets != IGNORED).sum())
        if self.teacher_hidden is None:
            nll, gradient = self.cross_entropy(logits, rows)
            objective.record("ce", count, nll)
            return loss.ce * nll, gradient.mul_(loss.ce)
        assert objective.teacher is not None
        teacher_logits = objective.teacher.logits(self.teacher_hidden[rows])
        kl, nll, gradient = in_blocks(self._block, logits, teacher_logits, targets)
        objective.record("kl", count, kl)
        objective.record("ce", count, nll)
        return loss.kl * kl + loss.ce * nll, gradient

    def _block(self, logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the KL divergence and the NLL of each row, and the gradient of the weighted loss."""
        loss = self.objective.loss
        t = loss.temperature
        labelled = (targets != IGNORED).float()
        chosen = targets.clamp(min=0)[:, None]
        student, log_p = logits.float(), (teacher_logits.float() / t).log_softmax(-1)
        log_q = (student / t).log_softmax(-1)
        p = log_p.exp()
        kl = (p * log_p.sub_(log_q)).sum(-1) * t**2 * labelled
        if t == 1:  # KL and NLL then share a softmax
            nll = -log_q.gather(1, chosen)[:, 0]
            gradient = log_q.exp_().mul_(loss.kl + loss.ce).sub_(p, alpha=loss.kl)
        else:
            log_student = student.log_softmax(-1)
            nll = -log_student.gather(1, chosen)[:, 0]
            gradient = log_q.exp_().sub_(p).mul_(loss.kl * t).add_(log_student.exp_(), alpha=loss.ce)
        gradient.scatter_add_(1, chosen, torch.full_like(nll[:, None], -loss.ce)).mul_(labelled[:, None])
        return kl, nll * labelled, gradient.to(logits.dtype)
