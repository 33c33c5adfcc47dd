"""Run a language model's head on given hidden states, without its decoder.

A head is more than one linear layer: models cap or scale their logits in ``forward``. So the model's own ``forward``
runs, with a decoder that returns the hidden states at once. Callers must check on some tokens that the logits are those
of the whole model: a model may compute them from more than its last hidden states.
"""

from collections import OrderedDict
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
        forward: Runs the model; default: the forward of its class, for use inside the model's own forward. Elsewhere
            pass the model, so that hooks run, such as those that gather sharded weights.

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


@contextmanager
def _decoder_replaced(model: PreTrainedModel, output: Any) -> Iterator[None]:
    """Replaces a model's decoder by one that returns a given output."""
    modules, name = model._modules, body_name(model)
    decoder = modules[name]
    assert decoder is not None
    modules[name] = _stub_of(decoder, output)
    try:
        yield
    finally:
        modules[name] = decoder


def _stub_of(decoder: nn.Module, output: Any) -> nn.Module:
    """Returns a module with the class, attributes and children of a decoder that returns a given output.

    The children are there for models that read a tied embedding, and for hooks that look for a module. The hooks of the
    decoder do not run: those of a sharding engine would gather weights that nothing uses.
    """
    stub: nn.Module = object.__new__(type(decoder))  # without __init__, which would create weights
    stub.__dict__.update(decoder.__dict__)
    for hooks in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
        stub.__dict__[hooks] = OrderedDict()
    stub.__dict__["_compiled_call_impl"] = None
    stub.__dict__["forward"] = lambda *args, **kwargs: output
    return stub
