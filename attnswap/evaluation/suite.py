"""The long-context suite: all measurements of this package, of a model and of the model before patching."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from attnswap.errors import ConfigError, NumericsError
from attnswap.evaluation.bootstrap import block_bootstrap
from attnswap.evaluation.corpus import WINDOWS
from attnswap.evaluation.estimate import token_progress
from attnswap.evaluation.fidelity import Fidelity, measure_fidelity, scorers_of_both
from attnswap.evaluation.perplexity import CONTEXTS, evaluate_perplexity
from attnswap.evaluation.quantize import layers_to_round, rounded
from attnswap.evaluation.result import Evaluation
from attnswap.evaluation.retrieval import DEPTHS, TASKS, Cell, check_prompts, measure_retrieval
from attnswap.evaluation.structure import FIRST_QUERY, Structure, measure_structure
from attnswap.visible import visible

BITS = (8, 4)
ROUNDED_TOKENS = 16384
"""Maximum number of tokens on which models with rounded weights are measured."""


@dataclass(frozen=True)
class SuiteOptions:
    """The extent of the measurements.

    Attributes:
        contexts: Context lengths in tokens. Retrieval uses those of at least 512.
        max_tokens: Scored tokens for the perplexity of each context; None: the complete text.
        tasks: Retrieval tasks.
        depths: Depths at which retrieval hides its texts.
        prompts: Prompts per task, length and depth.
        quantized_context: Context length for the measurements with rounded weights.
        seed: Seed of prompts and bootstrap.
    """

    contexts: tuple[int, ...] = CONTEXTS
    max_tokens: int | None = 16384
    tasks: tuple[str, ...] = tuple(TASKS)
    depths: tuple[float, ...] = DEPTHS
    prompts: int = 4
    quantized_context: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class Profile:
    """The measurements of one model.

    Attributes:
        evaluation: Perplexity by context and by position.
        retrieval: All cells of the retrieval grids.
        structure: Statistics of the attention weights and the hidden states.
        quantized: NLL of every scored token at ``quantized_context``, by the precision of the weights ("full" first).
            Precisions at which losses are not finite are left out.
        rounded_share: Share of the model's parameters that were rounded.
        options: The extent of the measurements.
        fidelity: Divergence from the reference; None if there is no reference.
    """

    evaluation: Evaluation
    retrieval: list[Cell]
    structure: Structure
    quantized: dict[str, np.ndarray]
    rounded_share: float
    options: SuiteOptions
    fidelity: Fidelity | None = None


@dataclass(frozen=True)
class Gain:
    """The gain of one context length over the shortest one.

    Attributes:
        context: Context length in tokens.
        gain: Mean NLL at the shortest context minus the mean NLL at this one, over the same tokens. Positive if the
            longer context helps.
        lo: Lower end of the 95% interval.
        hi: Upper end of the 95% interval.
    """

    context: int
    gain: float
    lo: float
    hi: float


def gain_from_context(evaluation: Evaluation) -> list[Gain]:
    """Returns the gain of each longer context over the shortest one, paired token by token.

    Args:
        evaluation: An evaluation of at least two context lengths.
    """
    shortest = min(evaluation.nll)
    found = []
    for context in sorted(evaluation.nll):
        if context == shortest:
            continue
        difference = evaluation.nll[shortest].astype(np.float64) - evaluation.nll[context]
        means = block_bootstrap(difference, block=evaluation.env["block"], seed=evaluation.env["seed"])
        lo, hi = np.quantile(means, [0.025, 0.975])
        found.append(Gain(context, float(difference.mean()), float(lo), float(hi)))
    return found


def profile(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: nn.Module | None = None,
    options: SuiteOptions | None = None,
    text: str | Sequence[str] | None = None,
    baseline: Evaluation | None = None,
    model_id: str | None = None,
    corpus_id: str | None = None,
    quiet: bool = False,
) -> Profile:
    """Runs the suite on one model.

    Args:
        model: A causal language model, patched or not.
        tokenizer: The model's tokenizer.
        reference: The model before patching, for the divergence.
        options: The extent of the measurements.
        text: The text; default: the offline evaluation text.
        baseline: An evaluation of the reference, which must have scored the same tokens.
        model_id: Name of the model in the report.
        corpus_id: Name of the text.
        quiet: Print nothing and show no progress bar. The bar is also off if stderr is not a terminal.

    Raises:
        ConfigError: An argument is out of range, or the text is too short.
        UnsupportedModelError: The weights cannot be rounded.
        NumericsError: A measurement is not finite, except for those with rounded weights.
    """
    options = options or SuiteOptions()
    longest = max(options.contexts)
    lengths = [n for n in options.contexts if n >= min(512, longest)]
    window, context = min(1024, longest), min(2048, longest)
    if longest <= FIRST_QUERY:
        raise ConfigError(f"the longest context must be more than {FIRST_QUERY} tokens, not {longest}")
    check_prompts(tokenizer, options.tasks, lengths, options.depths, options.prompts, options.seed)
    layers_to_round(model)  # refuses a model that cannot be rounded before anything is measured
    if reference is not None:
        scorers_of_both(model, reference)
    joined = text if text is None or isinstance(text, str) else "\n\n".join(text)
    common: dict[str, Any] = {
        "text": text, "corpus_id": corpus_id, "model_id": model_id, "seed": options.seed, "quiet": quiet,
    }  # fmt: skip
    show = not quiet and sys.stderr.isatty()

    def say(what: str) -> None:
        if not quiet:
            print(visible(f"{model_id or type(model).__name__}: {what}"), file=sys.stderr, flush=True)

    say("perplexity by context")
    evaluation = evaluate_perplexity(
        model, tokenizer, contexts=options.contexts, max_tokens=options.max_tokens, baseline=baseline, **common
    )
    say("retrieval")
    with token_progress(len(options.tasks) * len(options.depths) * options.prompts * sum(lengths), show) as advance:
        retrieval = measure_retrieval(
            model,
            tokenizer,
            tasks=options.tasks,
            lengths=lengths,
            depths=options.depths,
            n=options.prompts,
            seed=options.seed,
            advance=advance,
        )
    say("attention structure")
    with token_progress(WINDOWS * window, show) as advance:
        structure = measure_structure(model, tokenizer, text=joined, window=window, advance=advance)
    say("rounded weights")
    quantized, share = _measure_rounded(model, tokenizer, options, common)
    fidelity = None
    if reference is not None:
        say("divergence from the original")
        with token_progress(WINDOWS * context, show) as advance:
            fidelity = measure_fidelity(model, reference, tokenizer, text=joined, context=context, advance=advance)
    return Profile(evaluation, retrieval, structure, quantized, share, options, fidelity)


def _measure_rounded(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: SuiteOptions, common: dict[str, Any]
) -> tuple[dict[str, np.ndarray], float]:
    """Returns the losses by precision of the weights, "full" first, and the share of rounded parameters."""
    plain: dict[str, Any] = {
        "contexts": (min(options.quantized_context, max(options.contexts)),),
        "max_tokens": min(options.max_tokens or ROUNDED_TOKENS, ROUNDED_TOKENS),
        "positions": False,
        **common,
    }
    (full,) = evaluate_perplexity(model, tokenizer, **plain).nll.values()
    quantized, share = {"full": full}, 0.0
    for bits in BITS:
        with rounded(model, bits) as count, suppress(NumericsError):  # a model that rounding destroys has no losses
            share = count / sum(p.numel() for p in model.parameters())
            (quantized[f"int{bits}"],) = evaluate_perplexity(model, tokenizer, **plain).nll.values()
    return quantized, share
