"""The work of ``attnswap eval``: load models, measure their perplexity, report it."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from attnswap.cli.terminal import Terminal
from attnswap.distributed import destroy_process_group, rank_and_world_size
from attnswap.evaluation import Evaluation, evaluate_perplexity, table, write_report
from attnswap.evaluation.bootstrap import check_comparable
from attnswap.evaluation.corpus import load_corpus
from attnswap.evaluation.report import full_report
from attnswap.evaluation.suite import SuiteOptions
from attnswap.evaluation.windows import plan
from attnswap.loading import load_config_of, load_model, load_tokenizer


@dataclass(frozen=True)
class Measurement:
    """A perplexity measurement: the text, the protocol, and how models are loaded. The same for every model.

    Attributes:
        dtype: Dtype of the weights; None: that of the checkpoint.
        device: Device of the models; None: the accelerator, or the CPU if there is none.
        contexts: Context lengths in tokens.
        text: The text, or several documents; None: the built-in text.
        corpus_id: Name of the text in reports.
        stride: Tokens between lm-eval windows; None: half windows.
        max_tokens: Largest number of scored tokens; None: the whole text.
        batch_size: Windows per forward pass.
        seed: Seed of the bootstrap.
    """

    dtype: torch.dtype | None
    device: str | None
    contexts: list[int]
    text: str | list[str] | None
    corpus_id: str | None
    stride: int | None
    max_tokens: int | None
    batch_size: int
    seed: int

    def suite_options(self, prompts: int) -> SuiteOptions:
        """Returns the options of ``--suite long`` for this measurement."""
        options = SuiteOptions(contexts=tuple(self.contexts), prompts=prompts, seed=self.seed)
        return options if self.max_tokens is None else replace(options, max_tokens=self.max_tokens)

    def check(self, references: list[str], baseline: Evaluation | None) -> None:
        """Checks everything that configs, tokenizers and the text tell, before any model is loaded.

        Raises:
            ConfigError: A model is missing, the text is too short, or two evaluations would not be comparable.
        """
        known = None if baseline is None else baseline.protocol
        for reference in references:
            load_config_of(reference)
            tokenizer = load_tokenizer(reference)
            corpus = load_corpus(tokenizer, self.text)
            protocol = plan(corpus, tokenizer, self.contexts, self.stride, self.max_tokens)
            if known is not None:
                check_comparable(protocol, known)
            known = protocol

    def run(self, reference: str, baseline: Evaluation | None) -> Evaluation:
        """Loads a model and measures its perplexity."""
        model = load_model(reference, dtype=self.dtype, device=self.device)
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(reference)
        return evaluate_perplexity(
            model,
            tokenizer,
            text=self.text,
            contexts=self.contexts,
            stride=self.stride,
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            baseline=baseline,
            model_id=reference,
            corpus_id=self.corpus_id,
            seed=self.seed,
        )


def evaluate(measurement: Measurement, model: str, baseline: str | None, out: Path | None, as_json: bool) -> None:
    """Measures a model and its baseline, and writes and prints the report.

    Args:
        measurement: The measurement.
        model: The model.
        baseline: A model to compare with, or the JSON of an earlier evaluation; None: there is no comparison.
        out: Directory of the report; None: the report is only printed.
        as_json: Print only the report, as JSON.
    """
    is_report = baseline is not None and Path(baseline).suffix == ".json"
    reference = Evaluation.load(baseline) if baseline is not None and is_report else None
    against = baseline if reference is None else None
    measurement.check([model] if against is None else [against, model], reference)
    if against is not None:
        reference = measurement.run(against, None)
    found = measurement.run(model, reference)
    first = rank_and_world_size()[0] == 0
    destroy_process_group()
    if first:
        if out and reference is not None and not is_report:
            write_report(reference, out, name="baseline")
        _report(found, reference, out, as_json)


def _report(found: Evaluation, baseline: Evaluation | None, out: Path | None, as_json: bool) -> None:
    """Writes an evaluation into a directory if one is given, and prints it as JSON or as a table."""
    if out:
        write_report(found, out, baseline=baseline)
    if as_json:
        sys.stdout.write(json.dumps(full_report(found, baseline), indent=2, allow_nan=False) + "\n")
    else:
        Terminal().print(table(found, baseline))
