"""Standard errors and paired intervals by block bootstrap.

The losses of neighbouring tokens are correlated, so blocks of consecutive tokens are resampled, not single tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnswap.errors import ConfigError
from attnswap.evaluation.windows import Protocol

if TYPE_CHECKING:
    from attnswap.evaluation.result import Evaluation

BLOCK = 128
RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """Perplexity at one context length against a baseline over the same tokens.

    Attributes:
        length: Context length in tokens.
        ratio: Perplexity over the baseline's; below 1 is better than the baseline.
        log_ratio: The logarithm of the ratio: mean NLL minus the baseline's, in nats.
        lo: Lower end of the confidence interval of the log ratio.
        hi: Upper end of that interval.
        se: Standard error of the log ratio.
    """

    length: int
    ratio: float
    log_ratio: float
    lo: float
    hi: float
    se: float


def block_bootstrap(values: np.ndarray, *, block: int = BLOCK, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns the means of bootstrap samples that are made of blocks.

    Args:
        values: One value per token, shape (tokens,).
        block: Tokens in a block; the last block may be shorter. The variance of fewer than 8 blocks cannot be
            estimated, so short data are cut into 8 blocks, or one per token.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Means, fp64 (resamples,).
    """
    if block < 1 or resamples < 2:
        raise ConfigError(f"block must be at least 1 and resamples at least 2, got {block} and {resamples}")
    starts = np.arange(0, len(values), min(block, max(1, len(values) // 8)))
    sums = np.add.reduceat(np.asarray(values, dtype=np.float64), starts)
    counts = np.diff(np.append(starts, len(values)))
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = generator.integers(len(starts), size=len(starts))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    return means


def standard_error(values: np.ndarray, **options: int) -> float:
    """Returns the standard error of the mean of some values; for the options see :func:`block_bootstrap`."""
    return float(block_bootstrap(values, **options).std(ddof=1))


def compare(
    evaluation: "Evaluation",
    baseline: "Evaluation",
    *,
    block: int | None = None,
    resamples: int = RESAMPLES,
    seed: int | None = None,
    level: float = 0.95,
) -> list[Comparison]:
    """Compares two evaluations of the same tokens, paired token by token.

    Args:
        evaluation: The evaluation of the model of interest.
        baseline: The evaluation of the model that it is compared with.
        block: See :func:`block_bootstrap`; default: the block size of the evaluation's own standard errors.
        resamples: See :func:`block_bootstrap`.
        seed: See :func:`block_bootstrap`; default: the evaluation's.
        level: Confidence level of the percentile interval.

    Returns:
        One entry for each context length of both evaluations, ascending.

    Raises:
        ConfigError: The two scored different tokens, used different protocols, or share no context length.
    """
    check_comparable(evaluation.protocol, baseline.protocol)
    block = evaluation.env["block"] if block is None else block
    seed = evaluation.env["seed"] if seed is None else seed
    tail = (1 - level) / 2
    found = []
    for length in (n for n in evaluation.protocol.contexts if n in baseline.nll):
        difference = evaluation.nll[length].astype(np.float64) - baseline.nll[length]
        means = block_bootstrap(difference, block=block, resamples=resamples, seed=seed)
        lo, hi = np.quantile(means, [tail, 1 - tail])
        log_ratio = float(difference.mean())
        found.append(
            Comparison(length, float(np.exp(log_ratio)), log_ratio, float(lo), float(hi), float(means.std(ddof=1)))
        )
    return found


def check_comparable(ours: Protocol, baseline: Protocol) -> None:
    """Raises :class:`ConfigError` unless two protocols score the same tokens in the same way at a common length."""
    same: dict[str, Callable[[Protocol], Any]] = {
        "protocol": lambda p: (p.name, p.stride),
        "prefix token": lambda p: p.prefix_id,
        "scored tokens": lambda p: (p.first_token, p.scored_tokens),
        "token ids": lambda p: p.tokens_sha256,
    }
    for what, key in same.items():
        if key(ours) != key(baseline):
            raise ConfigError(
                f"not comparable with the baseline: {what} {_short(key(ours))}, baseline {_short(key(baseline))}; "
                "evaluate both with the same text, tokenizer, contexts, stride and max_tokens"
            )
    if not set(ours.contexts) & set(baseline.contexts):
        raise ConfigError(
            f"not comparable with the baseline: contexts {list(ours.contexts)}, baseline {list(baseline.contexts)}"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12]
