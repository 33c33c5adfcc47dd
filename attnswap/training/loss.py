"""The training loss, computed without the logits of a whole window.

With a vocabulary of 50k and a window of 8k tokens the logits take 1.6 GB in fp32, and their gradient as much again.
Here the decoder runs once, and the head runs on a chunk of positions at a time; see
:mod:`attnswap.training.chunked_head`. The head does not run for positions without a label.

The loss replaces the ``forward`` of the model instance, so that DDP, mixed precision and ``Trainer`` call the model as
usual and gradients pass through the same hooks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from attnswap.distributed import rank_and_world_size, to_local
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.evaluation.lm_head import head_logits
from attnswap.modes import evaluating
from attnswap.surgery.body import body_of
from attnswap.training.chunked_head import IGNORED, CrossEntropy, RowLoss, head_loss

CHUNK = 512
"""Positions whose logits are in memory at the same time."""


class BatchObjective(Protocol):
    """The loss of one batch."""

    def row_loss(self, targets: Tensor, positions: tuple[Tensor, Tensor]) -> RowLoss | None:
        """Returns the loss of the logits of labelled positions, or None if the objective does not use logits.

        Args:
            targets: Labels, shape (rows,).
            positions: Batch and sequence indices of the labels in the hidden states.
        """

    def layer_loss(self) -> Tensor | float:
        """Returns the mean per token of the losses that do not depend on logits. Called after the decoder has run."""


class Objective(Protocol):
    """A training objective other than plain cross entropy; see :class:`attnswap.training.Distillation`."""

    def for_batch(
        self, model: PreTrainedModel, inputs: dict[str, Any], text_mask: Tensor
    ) -> AbstractContextManager[BatchObjective]:
        """Prepares the loss of one batch. The caller runs the model's decoder inside the context.

        Args:
            model: The student.
            inputs: The inputs of its decoder.
            text_mask: Which positions are text and not padding, shape (batch, tokens).
        """


@dataclass
class ChunkedLossOutput(ModelOutput):
    """The output of a model inside :func:`chunked_loss`.

    Attributes:
        loss: Sum of the loss (negative log-likelihood, or the objective's loss) over the number of labels, or over
            ``num_items_in_batch``; a scalar.
        nll: Sum of the loss of each row, fp32, shape (batch,).
        tokens: Number of labels in each row, shape (batch,).
    """

    loss: Tensor | None = None
    nll: Tensor | None = None
    tokens: Tensor | None = None


def forward_with_loss(
    model: PreTrainedModel,
    labels: Tensor,
    *,
    chunk: int = CHUNK,
    num_items_in_batch: Any = None,
    objective: Objective | None = None,
    **inputs: Any,
) -> ChunkedLossOutput:
    """Runs the decoder, then the head and the loss on ``chunk`` positions at a time.

    Args:
        model: A causal language model.
        labels: Token ids, -100 for positions without a label, shape (batch, tokens). They are shifted by this function.
        chunk: Positions whose logits are in memory at the same time.
        num_items_in_batch: Divisor of the summed loss; None: the number of labels in this batch.
        objective: The training objective; None: cross entropy with the labels.
        **inputs: The inputs of the decoder: ``input_ids``, ``position_ids``, ...

    Returns:
        The loss, which can be differentiated once, and its sums by row.
    """
    context: AbstractContextManager[BatchObjective | None] = nullcontext(None)
    if objective is not None:
        context = objective.for_batch(model, inputs, _text_mask(labels))
    with context as batch_objective:
        outputs = body_of(model)(**inputs, use_cache=False)
    hidden = outputs.last_hidden_state[:, :-1]
    targets = labels[:, 1:].to(hidden.device)
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    if len(rows) == 0:  # every parameter needs a gradient, or the other processes of DDP would wait for it
        rows = columns = torch.zeros(1, dtype=torch.long, device=hidden.device)
    kept_targets = targets[rows, columns]
    # Other outputs of the decoder, such as its hidden states, would stay in memory until the backward pass.
    bare = type(outputs)()
    if batch_objective is None:
        loss: RowLoss | None = CrossEntropy(kept_targets)
    else:
        loss = batch_objective.row_loss(kept_targets, (rows, columns))
    if loss is None:
        total, nll = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros(len(rows), dtype=torch.float32)
    else:
        total, nll = head_loss(
            hidden[rows, columns],
            lambda part: head_logits(model, bare, part[None])[0],
            _outside_decoder(model),
            loss,
            chunk,
            sharded=any(isinstance(module, FSDPModule) for module in model.modules()),
        )
    tokens = (targets != IGNORED).sum(dim=1)
    labelled = tokens.sum()
    divisor = labelled if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=nll.device)
    if batch_objective is not None:
        total = total + labelled * batch_objective.layer_loss()
    if loss is None and rank_and_world_size(model)[1] > 1:  # DDP waits for the gradient of every parameter
        total = total + 0.0 * torch.stack([to_local(p).sum() for p in model.parameters() if p.requires_grad]).sum()
    return ChunkedLossOutput(
        loss=total / divisor.clamp(min=1),
        nll=torch.zeros(len(labels), device=nll.device).index_add(0, rows, nll),
        tokens=tokens,
    )


def _text_mask(labels: Tensor) -> Tensor:
    """Returns which positions are text and not padding, shape (batch, tokens): all up to the last label of a row."""
    return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0


def _outside_decoder(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the children of a model except its decoder, which are the head."""
    body = body_of(model)
    return [child for child in model.children() if child is not body]


@contextmanager
def chunked_loss(model: PreTrainedModel, *, chunk: int = CHUNK, objective: Objective | None = None) -> Iterator[None]:
    """Makes ``model(..., labels=...)`` compute the chunked loss. Calls without labels are not changed.

    Args:
        model: A causal language model, patched or not.
        chunk: Positions whose logits are in memory at the same time.
        objective: The objective in training mode; None: cross entropy. In evaluation mode it is always cross entropy.

    Raises:
        ConfigError: The model adds a loss for the routers of its experts, which the chunked loss does not compute.
        UnsupportedModelError: The head, run without the decoder, does not give the model's logits.
    """
    if getattr(model.config, "output_router_logits", False):
        raise ConfigError(
            "the chunked loss does not compute the auxiliary loss of the routers: set output_router_logits to false"
        )
    _check_head(model)
    previous = model.__dict__.get("forward")  # accelerate's device hooks are here
    original = model.forward

    # Not functools.wraps: accelerate follows __wrapped__ when it removes its own wrappers, and would remove this one.
    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        inputs = {"input_ids": input_ids, "position_ids": position_ids, **kwargs}
        if labels is None:
            return original(**inputs)
        chosen = objective if self.training else None
        return forward_with_loss(
            self, labels, chunk=chunk, num_items_in_batch=num_items_in_batch, objective=chosen, **inputs
        )

    model.forward = MethodType(forward, model)
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):  # the second is what accelerate leaves behind
            model.__dict__.pop(name, None)
        if previous is not None:
            model.forward = previous


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Checks on four tokens that the head, run on the decoder's output, gives the model's logits."""
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with evaluating(model):
            expected = model(input_ids=ids, use_cache=False).logits
            outputs = body_of(model)(input_ids=ids, use_cache=False)
            actual = head_logits(model, outputs, outputs.last_hidden_state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the training loss runs the head of a model without its decoder, and that of {type(model).__name__} "
            f"cannot: {error}"
        ) from error
    if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-5):
        raise UnsupportedModelError(
            f"the training loss runs the head of a model without its decoder, and that of {type(model).__name__} gives "
            "other logits then, so that the loss would be wrong: this architecture cannot be trained with attnswap"
        )
