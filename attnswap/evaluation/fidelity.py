"""How far a model's predictions are from another's: KL divergence and agreement of the most likely token."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from attnswap.errors import ConfigError, non_finite
from attnswap.evaluation.corpus import WINDOWS, spread_windows
from attnswap.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Fidelity:
    """Means over tokens.

    Attributes:
        kl: KL(reference || model) of the next-token distributions, nats a token.
        top1: Share of the tokens at which both have the same favourite.
        tokens: How many.
        context: Tokens of a window.
    """

    kl: float
    top1: float
    tokens: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def comparable(model: nn.Module, reference: nn.Module) -> tuple[Scorer, Scorer]:
    """Returns what reads two models whose predictions can be compared.

    Raises:
        ConfigError: Their vocabularies differ.
    """
    ours, theirs = Scorer(model), Scorer(reference)
    if ours.vocabulary != theirs.vocabulary:
        raise ConfigError(f"vocabularies of {ours.vocabulary} and {theirs.vocabulary} tokens cannot be compared")
    return ours, theirs


def measure_fidelity(
    model: nn.Module,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | None = None,
    context: int = 2048,
    windows: int = WINDOWS,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Fidelity:
    """Compares a model's predictions with those of the model it was.

    Args:
        model: A causal language model.
        reference: Another one with the same vocabulary.
        tokenizer: Their tokenizer.
        text: The text; default: the offline evaluation text.
        context: Tokens of a window, BOS included.
        windows: How many windows, from all over the text.
        advance: Called with the number of tokens read by each model.

    Raises:
        ConfigError: The vocabularies differ, or the text is shorter than a window.
        NumericsError: The divergence is not finite.
    """
    ours, theirs = comparable(model, reference)
    inputs = spread_windows(tokenizer, text, context, windows)
    kl, same, tokens = 0.0, 0, 0
    with ours.ready(), theirs.ready():
        for ids in inputs:
            pairs = (scorer.rows(ids.to(scorer.device), context, size=128) for scorer in (ours, theirs))
            for q, p in zip(*pairs, strict=True):
                log_p = p.log_softmax(-1)
                kl += float((log_p.exp() * (log_p - q.log_softmax(-1).to(log_p.device))).sum())
                same += int((p.argmax(-1) == q.argmax(-1).to(p.device)).sum())
                tokens += p.shape[0] * p.shape[1]
            advance(context)
    if not math.isfinite(kl):
        raise non_finite(f"non-finite divergence of the two models at context {context}")
    return Fidelity(kl=kl / tokens, top1=same / tokens, tokens=tokens, context=context)
