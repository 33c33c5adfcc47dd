"""Compare the predictions of two models: KL divergence and agreement of the most likely token."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from attnswap.errors import ConfigError, non_finite
from attnswap.evaluation.corpus import WINDOWS, sample_windows
from attnswap.evaluation.scoring import Scorer


@dataclass(frozen=True)
class Fidelity:
    """How far a model's predictions are from a reference's; means over tokens.

    Attributes:
        kl: KL(reference || model) of the next-token distributions, in nats per token.
        top1: Share of the positions at which both models find the same token most likely.
        tokens: Number of positions.
        context: Tokens in a window.
    """

    kl: float
    top1: float
    tokens: int
    context: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def scorers_of_both(model: nn.Module, reference: nn.Module) -> tuple[Scorer, Scorer]:
    """Returns the scorers of two models that are to be compared.

    Raises:
        ConfigError: The vocabularies of the models differ in size.
    """
    ours, theirs = Scorer(model), Scorer(reference)
    if ours.vocabulary != theirs.vocabulary:
        raise ConfigError(
            f"the models have vocabularies of {ours.vocabulary} and {theirs.vocabulary} tokens, so their predictions "
            "cannot be compared: give two models with the same tokenizer"
        )
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
    """Compares a model's predictions with those of a reference, such as the model before patching.

    Args:
        model: A causal language model.
        reference: The other model, with the same vocabulary.
        tokenizer: The tokenizer of both.
        text: The text; default: the offline evaluation text.
        context: Tokens in a window, BOS included.
        windows: Number of windows, at regular distances in the text.
        advance: Called after each window with the number of tokens that each model has read.

    Raises:
        ConfigError: The vocabularies differ, or the text is shorter than a window.
        NumericsError: The divergence is not finite.
    """
    ours, theirs = scorers_of_both(model, reference)
    inputs = sample_windows(tokenizer, text, context, windows)
    kl, same, tokens = 0.0, 0, 0
    with ours.eval_no_grad(), theirs.eval_no_grad():
        for ids in inputs:
            pairs = (scorer.logit_chunks(ids.to(scorer.device), context, size=128) for scorer in (ours, theirs))
            for q, p in zip(*pairs, strict=True):
                log_p = p.log_softmax(-1)
                kl += float((log_p.exp() * (log_p - q.log_softmax(-1).to(log_p.device))).sum())
                same += int((p.argmax(-1) == q.argmax(-1).to(p.device)).sum())
                tokens += p.shape[0] * p.shape[1]
            advance(context)
    if not math.isfinite(kl):
        raise non_finite(f"the KL divergence of the two models at context {context} is not finite")
    return Fidelity(kl=kl / tokens, top1=same / tokens, tokens=tokens, context=context)
