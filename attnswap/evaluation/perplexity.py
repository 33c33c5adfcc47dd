"""Perplexity and bits per byte of a model at several context lengths, over the same tokens."""

import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnswap.distributed import all_gather_dicts, raise_on_all_ranks, rank_and_world_size
from attnswap.errors import ConfigError, NumericsError
from attnswap.evaluation.bootstrap import BLOCK, check_comparable, standard_error
from attnswap.evaluation.corpus import load_corpus
from attnswap.evaluation.estimate import Estimate, Progress, estimate, peak_memory
from attnswap.evaluation.result import ContextMetrics, Evaluation, PositionNLL, mean_nll
from attnswap.evaluation.scoring import Scorer
from attnswap.evaluation.windows import Protocol, Window, plan
from attnswap.visible import visible

CONTEXTS = (512, 1024, 2048, 4096, 8192)


def evaluate_perplexity(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Sequence[str] | None = None,
    contexts: Sequence[int] = CONTEXTS,
    stride: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 1,
    positions: bool = True,
    block: int = BLOCK,
    seed: int = 0,
    baseline: Evaluation | None = None,
    model_id: str | None = None,
    corpus_id: str | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Measures a causal language model, patched or not, at several context lengths over the same tokens.

    At context length L a window spans L tokens of text. The model reads BOS (if the tokenizer has one) and the first
    L - 1 of them, and the last half of the window is scored. Scoring starts at half the largest context, so that every
    length scores the same tokens, each once and with at least half a window of text before it. The mean NLL is
    accumulated in fp64 from an fp32 log-softmax of chunks of logits. In a run of several processes
    (``torch.distributed``) the windows are divided among them, and all of them return the same evaluation.

    Args:
        model: The model, in any dtype and on any device. It is put into evaluation mode meanwhile.
        tokenizer: The model's tokenizer.
        text: The text, or documents that are joined by blank lines; default: the offline evaluation text.
        contexts: Context lengths in tokens.
        stride: None for the protocol above. An integer S gives the rolling windows of lm-eval: only the first window
            has the prefix token, scoring starts at the first token of the text, and each window scores min(S, L) new
            tokens. With S >= L these are the disjoint windows of ``loglikelihood_rolling``.
        max_tokens: Upper limit of the scored tokens; default: the whole text.
        batch_size: Windows per forward pass.
        positions: Also measure the NLL by position in disjoint windows of the largest context (one more pass).
        block: Tokens in a block of the bootstrap.
        seed: Seed of the bootstrap.
        baseline: An evaluation that this one will be compared with; checked before any work is done.
        model_id: Name of the model in the report; default: the name in its config.
        corpus_id: Name of the text in the report.
        quiet: Print no estimate and show no progress bar. The bar is also off if stderr is not a terminal.

    Returns:
        The evaluation; :func:`attnswap.evaluation.write_report` writes it to files.

    Raises:
        ConfigError: An argument is out of range, the text is too short, or the baseline scored other tokens.
        NumericsError: A loss is not finite; the message names the window.
        UnsupportedModelError: The model is not a decoder with a head on its last hidden states.
    """
    if batch_size < 1 or block < 1:
        raise ConfigError(f"batch_size and block must be at least 1, got {batch_size} and {block}")
    scorer = Scorer(model)
    corpus = load_corpus(tokenizer, text, corpus_id)
    protocol = plan(corpus, tokenizer, contexts, stride, max_tokens)
    if baseline is not None:
        check_comparable(protocol, baseline.protocol)
    # The largest context first: if it does not fit into memory, the run fails early.
    jobs = {str(length): protocol.windows(length) for length in reversed(protocol.contexts)}
    if positions:
        jobs["positions"] = protocol.position_windows()
    notes = _notes(scorer.model, protocol, baseline)
    with scorer.eval_no_grad():
        scorer.check_scorable(corpus.ids, protocol.contexts)
        run = _score(scorer, corpus.ids, protocol.prefix_id, jobs, batch_size, notes, quiet)
    scored = {length: np.concatenate(run.losses[str(length)]) for length in protocol.contexts}
    return Evaluation(
        protocol=protocol,
        metrics=[_metrics(length, scored[length], protocol, block, seed) for length in protocol.contexts],
        nll=scored,
        position_nll=_by_position(jobs["positions"], run.losses["positions"]) if positions else [],
        model=_describe_model(scorer.model, model_id),
        swap=getattr(scorer.model.config.get_text_config(), "attnswap", None),
        corpus=corpus.describe(),
        env=_environment(scorer, block, seed),
        cost=_cost(jobs, run, batch_size),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=notes,
    )


@dataclass(frozen=True)
class _Scored:
    """Losses, and the cost of computing them. A job is one context length, or the curve by position.

    Attributes:
        losses: The NLL of the scored tokens by job, one array per window.
        seconds: Duration by job.
        peak_bytes: Peak memory while scoring.
        forecast: The estimate made before.
    """

    losses: dict[str, list[np.ndarray]]
    seconds: dict[str, float]
    peak_bytes: int
    forecast: Estimate


def _score(
    scorer: Scorer,
    ids: Tensor,
    prefix_id: int | None,
    jobs: dict[str, list[Window]],
    batch_size: int,
    notes: list[str],
    quiet: bool,
) -> _Scored:
    """Estimates the cost, then scores the windows of every job, which are divided among the processes."""
    rank, world_size = rank_and_world_size(scorer.model)
    batches = {job: list(enumerate(_batches(windows, batch_size))) for job, windows in jobs.items()}
    mine = {job: every[rank::world_size] for job, every in batches.items()}
    everything = [window for every in mine.values() for _, batch in every for window in batch]
    if not everything:  # fewer windows than processes: this process takes part in the estimate all the same
        everything = [window for windows in jobs.values() for window in windows]
    with raise_on_all_ranks():
        forecast = estimate(scorer, ids, everything, prefix_id, batch_size)
    quiet = quiet or rank > 0
    if not quiet:
        print(visible("\n".join([str(forecast), *notes])), file=sys.stderr)
    progress = Progress(everything, forecast.window_seconds, show=not quiet and sys.stderr.isatty())
    losses: dict[str, list[np.ndarray]] = {}
    seconds: dict[str, float] = {}
    try:
        with peak_memory(scorer.device) as peak:
            for job, every in mine.items():
                started = time.perf_counter()
                found: dict[int, np.ndarray] = {}
                with raise_on_all_ranks():
                    for index, batch in every:
                        found[index] = scorer.score(ids, batch, prefix_id).numpy()
                        progress.advance(job, batch)
                found = all_gather_dicts(found, world_size)
                losses[job] = [nll for index in sorted(found) for nll in found[index]]
                seconds[job] = time.perf_counter() - started
    finally:
        progress.close()
    return _Scored(losses, seconds, peak.bytes, forecast)


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Yields batches of consecutive windows that have the same shape, so that none needs padding."""
    for _, same in groupby(windows, key=lambda window: (window.fed, window.scored, window.prefix)):
        group = list(same)
        yield from (group[i : i + size] for i in range(0, len(group), size))


def _metrics(length: int, nll: np.ndarray, protocol: Protocol, block: int, seed: int) -> ContextMetrics:
    mean = mean_nll(nll)
    if mean > math.log(sys.float_info.max):
        raise NumericsError(f"the perplexity at context {length} is not finite: the mean NLL is {mean:.0f} nats")
    return ContextMetrics(
        length=length,
        nll=mean,
        ppl=math.exp(mean),
        bpb=mean * len(nll) / math.log(2) / protocol.scored_bytes,
        se=standard_error(nll, block=block, seed=seed),
    )


def _by_position(windows: list[Window], losses: list[np.ndarray]) -> list[PositionNLL]:
    """Averages the NLL over buckets of positions: 0, 1, 2-3, 4-7, ... text tokens before the scored one."""
    position = np.concatenate([np.arange(w.first, w.end) - w.begin for w in windows])
    nll = np.concatenate(losses)
    curve, lo = [], 0
    while lo <= position.max():
        hi = max(2 * lo - 1, lo)
        inside = nll[(position >= lo) & (position <= hi)]
        if len(inside):
            curve.append(PositionNLL(lo, min(hi, int(position.max())), mean_nll(inside), len(inside)))
        lo = hi + 1
    return curve


def _notes(model: PreTrainedModel, protocol: Protocol, baseline: Evaluation | None) -> list[str]:
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    beyond = [length for length in protocol.contexts if trained and length > trained]
    notes = []
    if beyond:
        lengths = ", ".join(map(str, beyond))
        notes.append(f"warning: context {lengths} is beyond the model's max_position_embeddings of {trained}")
    if protocol.prefix_id is None:
        notes.append("the tokenizer has no BOS token: windows start with text")
    ours = _dtype(model)
    if baseline is not None and baseline.env["dtype"] != ours:
        theirs = baseline.env["dtype"]
        notes.append(
            f"warning: measured in {ours}, the baseline in {theirs}: their ratio includes the difference in rounding"
        )
    return notes


def _describe_model(model: PreTrainedModel, model_id: str | None) -> dict[str, Any]:
    return {
        "id": model_id or model.config._name_or_path or type(model).__name__,
        "revision": getattr(model.config, "_commit_hash", None),
        "arch": type(model).__name__,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "max_position_embeddings": getattr(model.config.get_text_config(), "max_position_embeddings", None),
    }


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _environment(scorer: Scorer, block: int, seed: int) -> dict[str, Any]:
    try:
        attnswap = version("attnswap")
    except PackageNotFoundError:
        attnswap = "unknown"
    device = scorer.device
    return {
        "attnswap": attnswap,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": _dtype(scorer.model),
        "attention": scorer.model.config.get_text_config()._attn_implementation,
        "seed": seed,
        "block": block,
    }


def _cost(jobs: dict[str, list[Window]], run: _Scored, batch_size: int) -> dict[str, Any]:
    tokens = {job: sum(window.fed for window in windows) for job, windows in jobs.items()}
    total = sum(run.seconds.values())
    return {
        "seconds": total,
        "tokens_read": sum(tokens.values()),
        "tokens_per_second": sum(tokens.values()) / total,
        "by_context": [{"context": job, "tokens": tokens[job], "seconds": run.seconds[job]} for job in jobs],
        "batch_size": batch_size,
        "peak_bytes": run.peak_bytes,
        "estimate": {"seconds": run.forecast.seconds, "peak_bytes": run.forecast.memory_bytes},
    }
