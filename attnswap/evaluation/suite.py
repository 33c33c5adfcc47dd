"""The long-context suite: everything this package can tell of a model, beside the model it was."""

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
from attnswap.evaluation.estimate import counting
from attnswap.evaluation.fidelity import Fidelity, comparable, measure_fidelity
from attnswap.evaluation.perplexity import CONTEXTS, evaluate_perplexity
from attnswap.evaluation.quantize import layers_to_round, rounded
from attnswap.evaluation.result import Evaluation
from attnswap.evaluation.retrieval import DEPTHS, TASKS, Cell, check_questions, measure_retrieval
from attnswap.evaluation.structure import FIRST_QUERY, Structure, measure_structure
from attnswap.visible import visible

BITS = (8, 4)
ROUNDED_TOKENS = 16384
"""Rounded weights are measured on so many tokens at most."""


@dataclass(frozen=True)
class SuiteOptions:
    """How much is measured.

    Attributes:
        contexts: Context lengths in tokens; retrieval takes those from 512 on.
        max_tokens: Scored tokens of perplexity at each context; None: the whole text.
        tasks: Retrieval tasks.
        depths: Depths of what is to be found.
        prompts: Prompts of each task, length and depth.
        quantized_context: Context at which rounded weights are measured.
        seed: Of prompts and bootstraps.
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
    """What the suite found of one model.

    Attributes:
        evaluation: Perplexity by context and by position.
        retrieval: Every cell of the grids.
        structure: What attention does.
        quantized: NLL of every scored token at ``quantized_context``, by the bits of the weights ("full" first); those
            with which losses are not finite are left out.
        rounded_share: Share of the model's parameters that were rounded.
        options: How much was measured.
        fidelity: Divergence from the reference; None without one.
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
    """What more context is worth at one length.

    Attributes:
        context: Tokens of context.
        gain: Mean NLL at the shortest context minus that here, over the same tokens; positive: context helps.
        lo: Lower end of the 95% interval.
        hi: Upper end.
    """

    context: int
    gain: float
    lo: float
    hi: float


def gain_from_context(evaluation: Evaluation) -> list[Gain]:
    """Returns what each longer context gains over the shortest, paired token by token.

    Args:
        evaluation: Every context of which scored the same tokens.
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
        tokenizer: Its tokenizer.
        reference: The model it was, for the divergence.
        options: How much is measured.
        text: The text; default: the offline evaluation text.
        baseline: The reference's evaluation, whose tokens this one must score.
        model_id: Name of the model in the report.
        corpus_id: Name of the text.
        quiet: Print nothing and show no bar (which also stays off where stderr is no terminal).

    Raises:
        ConfigError: An argument does not fit, or the text is too short.
        UnsupportedModelError: The weights cannot be rounded.
        NumericsError: A figure is not finite; rounded weights may be, and have no losses then.
    """
    options = options or SuiteOptions()
    longest = max(options.contexts)
    lengths = [n for n in options.contexts if n >= min(512, longest)]
    window, context = min(1024, longest), min(2048, longest)
    if longest <= FIRST_QUERY:
        raise ConfigError(f"the longest context must be more than {FIRST_QUERY} tokens, not {longest}")
    check_questions(tokenizer, options.tasks, lengths, options.depths, options.prompts, options.seed)
    layers_to_round(model)  # what cannot be rounded is refused before anything is measured
    if reference is not None:
        comparable(model, reference)
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
    with counting(len(options.tasks) * len(options.depths) * options.prompts * sum(lengths), show) as advance:
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
    with counting(WINDOWS * window, show) as advance:
        structure = measure_structure(model, tokenizer, text=joined, window=window, advance=advance)
    say("rounded weights")
    quantized, share = _measure_rounded(model, tokenizer, options, common)
    fidelity = None
    if reference is not None:
        say("divergence from the original")
        with counting(WINDOWS * context, show) as advance:
            fidelity = measure_fidelity(model, reference, tokenizer, text=joined, context=context, advance=advance)
    return Profile(evaluation, retrieval, structure, quantized, share, options, fidelity)


def _measure_rounded(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: SuiteOptions, common: dict[str, Any]
) -> tuple[dict[str, np.ndarray], float]:
    """Returns the losses by the bits of the weights, "full" first, and the share of the parameters that was rounded."""
    plain: dict[str, Any] = {
        "contexts": (min(options.quantized_context, max(options.contexts)),),
        "max_tokens": min(options.max_tokens or ROUNDED_TOKENS, ROUNDED_TOKENS),
        "positions": False,
        **common,
    }
    (full,) = evaluate_perplexity(model, tokenizer, **plain).nll.values()
    quantized, share = {"full": full}, 0.0
    for bits in BITS:
        with rounded(model, bits) as count, suppress(NumericsError):  # what rounding broke has no losses
            share = count / sum(p.numel() for p in model.parameters())
            (quantized[f"int{bits}"],) = evaluate_perplexity(model, tokenizer, **plain).nll.values()
    return quantized, share
