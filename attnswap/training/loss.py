"""Cross entropy that never holds the logits of a whole window.

With a vocabulary of 50k and a window of 8k tokens the logits alone take 1.6 GB in fp32, and their gradient as much
again. Here the decoder runs once, and the head sees a chunk of positions at a time; see
:mod:`attnswap.training.head`. Positions without a label never reach the head.

The loss stands in for the model's own ``forward`` while training, so that DDP, mixed precision and ``Trainer`` call
the model as always and gradients pass through the same hooks.
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
from attnswap.training.head import IGNORED, CrossEntropy, RowLoss, head_loss

CHUNK = 512
"""Positions whose logits exist at the same time."""


class Lesson(Protocol):
    """What an objective made of one batch."""

    def of_rows(self, targets: Tensor, positions: tuple[Tensor, Tensor]) -> RowLoss | None:
        """Returns what the logits of each labelled position cost, or None where they are not wanted.

        Args:
            targets: Labels, shape (rows,).
            positions: Their rows and columns among the hidden states.
        """

    def of_layers(self) -> Tensor | float:
        """Returns what is lost beside the logits, per token: called once the decoder has run."""


class Objective(Protocol):
    """What a model learns in place of its labels alone; see :class:`attnswap.training.Distillation`."""

    def teach(self, model: PreTrainedModel, inputs: dict[str, Any], read: Tensor) -> AbstractContextManager[Lesson]:
        """Prepares the lesson of one batch; the model's decoder runs inside the context.

        Args:
            model: The student.
            inputs: What its decoder takes.
            read: Which positions are text and no padding, shape (batch, tokens).
        """


@dataclass
class ChunkedLossOutput(ModelOutput):
    """What a model returns under :func:`chunked_loss`.

    Attributes:
        loss: Summed loss (negative log-likelihood, or what the objective says) over the number of labels (or over
            ``num_items_in_batch``), a scalar.
        nll: Summed loss of each row, fp32, shape (batch,).
        tokens: Number of labels behind it, shape (batch,).
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
    """Runs the decoder and the loss, ``chunk`` positions at a time.

    Args:
        model: A causal language model.
        labels: The tokens themselves, -100 where nothing is learned, shape (batch, tokens); shifted here.
        chunk: Positions whose logits exist at the same time.
        num_items_in_batch: What to divide the sum by; None: the number of labels here.
        objective: What is learned; None: the labels.
        **inputs: What the decoder takes: ``input_ids``, ``position_ids``, ...

    Returns:
        The loss, differentiable, and its sums by row.
    """
    teaching: AbstractContextManager[Lesson | None] = nullcontext(None)
    if objective is not None:
        teaching = objective.teach(model, inputs, _read(labels))
    with teaching as lesson:
        outputs = body_of(model)(**inputs, use_cache=False)
    hidden = outputs.last_hidden_state[:, :-1]
    targets = labels[:, 1:].to(hidden.device)
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
    if len(rows) == 0:  # every parameter must take part in the backward pass, or other processes wait for it
        rows = columns = torch.zeros(1, dtype=torch.long, device=hidden.device)
    kept_targets = targets[rows, columns]
    # What else the decoder returned would only keep memory alive until the backward pass.
    bare = type(outputs)()
    loss = CrossEntropy(kept_targets) if lesson is None else lesson.of_rows(kept_targets, (rows, columns))
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
    here = tokens.sum()
    divisor = here if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=nll.device)
    if lesson is not None:
        total = total + here * lesson.of_layers()
    if loss is None and rank_and_world_size(model)[1] > 1:  # other processes wait for every gradient
        total = total + 0.0 * torch.stack([to_local(p).sum() for p in model.parameters() if p.requires_grad]).sum()
    return ChunkedLossOutput(
        loss=total / divisor.clamp(min=1),
        nll=torch.zeros(len(labels), device=nll.device).index_add(0, rows, nll),
        tokens=tokens,
    )


def _read(labels: Tensor) -> Tensor:
    """Returns which positions are text, shape (batch, tokens): all up to a row's last label; padding comes after it."""
    return (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0


def _outside_decoder(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules beside the decoder: the head."""
    body = body_of(model)
    return [child for child in model.children() if child is not body]


@contextmanager
def chunked_loss(model: PreTrainedModel, *, chunk: int = CHUNK, objective: Objective | None = None) -> Iterator[None]:
    """Makes ``model(..., labels=...)`` compute the chunked loss; without labels nothing changes.

    Args:
        model: A causal language model, patched or not.
        chunk: Positions whose logits exist at the same time.
        objective: What is learned in training mode; None: the labels. In evaluation mode it is always the labels.

    Raises:
        ConfigError: The model adds a loss of its own for its routers, which the chunks would lose.
        UnsupportedModelError: The head cannot be run apart from the decoder with the same logits.
    """
    if getattr(model.config, "output_router_logits", False):
        raise ConfigError("the chunked loss leaves out the routers' loss: set output_router_logits to false")
    _prove(model)
    previous = model.__dict__.get("forward")  # device hooks sit here
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
        taught = objective if self.training else None
        return forward_with_loss(
            self, labels, chunk=chunk, num_items_in_batch=num_items_in_batch, objective=taught, **inputs
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
def _prove(model: PreTrainedModel) -> None:
    """Checks on four tokens that head after decoder gives exactly the model's logits."""
    ids = torch.arange(4, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with evaluating(model):
            expected = model(input_ids=ids, use_cache=False).logits
            outputs = body_of(model)(input_ids=ids, use_cache=False)
            actual = head_logits(model, outputs, outputs.last_hidden_state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__}: its head cannot be run apart from its decoder, as the training loss does: {error}"
        ) from error
    if not torch.allclose(actual, expected, rtol=1e-4, atol=1e-5):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its head gives other logits apart from its decoder, so the loss would be wrong"
        )
