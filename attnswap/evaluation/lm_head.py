"""Run a language model's head on given hidden states, without its decoder.

A head is more than one linear layer: models cap or scale their logits in ``forward``. So the model's own ``forward``
runs, with a decoder that returns the hidden states at once. Callers must check on some tokens that the logits are those
of the whole model: a model may compute them from more than its last hidden states.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from attnswap.surgery.body import body_name


def head_logits(
    model: PreTrainedModel, outputs: ModelOutput, hidden: Tensor, *, forward: Callable[..., Any] | None = None
) -> Tensor:
    """Applies a model's own head, soft cap and logit scale included, to some hidden states.

    Args:
        model: A causal language model.
        outputs: What its decoder returned.
        hidden: Last hidden states of the wanted positions, shape (batch, positions, width).
        forward: The forward to run; default: that of the model's class. ``model.forward`` includes what libraries put
            around it on the instance, such as accelerate's autocast.

    Returns:
        Logits of shape (batch, positions, vocabulary).
    """
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with _decoder_replaced(model, with_hidden(outputs, hidden)):
        if forward is None:
            return type(model).forward(model, input_ids=ids, use_cache=False).logits
        return forward(input_ids=ids, use_cache=False).logits


def with_hidden(outputs: ModelOutput, hidden: Tensor | None) -> Any:
    """Returns a copy of a decoder's output with other last hidden states."""
    return type(outputs)(**{**outputs, "last_hidden_state": hidden})


class _DecoderStub(nn.Module):
    """Returns a given output in place of computing it; has all other attributes of the decoder it replaces.

    Hooks on the decoder do not run: a sharding engine would gather and free weights that nothing uses.
    """

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        super().__init__()
        # Not as submodules: the decoder must not be found twice in the model.
        self.__dict__["decoder"], self.__dict__["output"] = decoder, output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["decoder"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["output"]


@contextmanager
def _decoder_replaced(model: PreTrainedModel, output: Any) -> Iterator[None]:
    modules, name = model._modules, body_name(model)
    decoder = modules[name]
    assert decoder is not None
    modules[name] = _DecoderStub(decoder, output)
    try:
        yield
    finally:
        modules[name] = decoder
