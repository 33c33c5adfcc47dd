"""``attnswap eval``: perplexity and bits per byte of a checkpoint at several context lengths."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedTokenizerBase

from attnswap.cli.options import check_folder, parse_device, parse_dtype, parse_size
from attnswap.cli.terminal import Terminal
from attnswap.distributed import destroy_process_group, init_process_group, rank_and_world_size
from attnswap.errors import ConfigError
from attnswap.evaluation import Evaluation, evaluate_perplexity, table, write_report
from attnswap.evaluation.bootstrap import check_comparable
from attnswap.evaluation.corpus import load_corpus, read_dataset, read_text
from attnswap.evaluation.report import full_report
from attnswap.evaluation.suite import SuiteOptions
from attnswap.evaluation.windows import plan
from attnswap.loading import load_config_of, load_model, load_tokenizer


def eval_command(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help='Checkpoint directory, GGUF file, hub name or "embedded".')
    ],
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens; k is 1024.")] = "512,1k,2k,4k,8k",
    text: Annotated[Path | None, typer.Option(help="Text file. Default: the built-in offline text.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set, NAME[:CONFIG[:SPLIT]].")] = None,
    baseline: Annotated[str | None, typer.Option(help="Model, or the JSON of an earlier evaluation.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: the checkpoint's own.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: the accelerator if there is one, else cpu.")] = None,
    stride: Annotated[str | None, typer.Option(help="lm-eval's windows instead of half-window ones.")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Score at most so many tokens, such as 16k.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a forward pass.")] = 1,
    suite: Annotated[
        str | None, typer.Option(help='"long": also retrieval, structure, rounding, an HTML page.')
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Retrieval prompts of each task, length and depth.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the prompts and the bootstraps.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for JSON, losses, table and plot.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Measure perplexity at several context lengths over the same tokens.

    Every length scores the same tokens, each once and with at least half a window of text before it. The ratio to a
    baseline comes with a paired block-bootstrap interval.
    """
    if text and dataset:
        raise ConfigError("give --text or --dataset, not both")
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {batch_size}")
    if suite not in (None, "long"):
        raise ConfigError(f'--suite "{suite}" does not exist; there is "long"')
    check_folder(out)
    shared = init_process_group(device)
    measurement = _Measurement(
        dtype=parse_dtype(dtype),
        device=shared or parse_device(device),
        contexts=[parse_size(part) for part in contexts.split(",")],
        text=read_text(text) if text else read_dataset(dataset) if dataset else None,
        corpus_id=text.name if text else dataset,
        stride=parse_size(stride) if stride else None,
        max_tokens=parse_size(max_tokens) if max_tokens else None,
        batch_size=batch_size,
        seed=seed,
    )
    if suite:
        if measurement.stride is not None or shared is not None or batch_size > 1:
            raise ConfigError(
                "--suite runs in one process and on its own windows, one at a time: leave out --stride and --batch-size"
            )
        from attnswap.cli.suite import run_suite

        return run_suite(
            model,
            baseline,
            options=measurement.suite_options(prompts),
            dtype=measurement.dtype,
            device=measurement.device,
            text=measurement.text,
            corpus_id=measurement.corpus_id,
            out=out,
            as_json=as_json,
        )

    is_report = baseline is not None and Path(baseline).suffix == ".json"
    reference = Evaluation.load(baseline) if baseline is not None and is_report else None
    against = baseline if reference is None else None
    measurement.look_first([model] if against is None else [against, model], reference)
    if against is not None:
        reference = measurement.run(against, None)
    found = measurement.run(model, reference)
    first = rank_and_world_size()[0] == 0
    destroy_process_group()
    if first:
        if out and reference is not None and not is_report:
            write_report(reference, out, name="baseline")
        _report(found, reference, out, as_json)


@dataclass(frozen=True)
class _Measurement:
    """What is measured of every model that the command names: on which text, by which protocol, loaded how."""

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
        options = SuiteOptions(contexts=tuple(self.contexts), prompts=prompts, seed=self.seed)
        return options if self.max_tokens is None else replace(options, max_tokens=self.max_tokens)

    def look_first(self, references: list[str], baseline: Evaluation | None) -> None:
        """Refuses what configs, tokenizers and the text already rule out, before any model is loaded and measured."""
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


def _report(found: Evaluation, baseline: Evaluation | None, out: Path | None, as_json: bool) -> None:
    """Writes an evaluation into a directory, if there is one, and prints it as JSON or as a table."""
    if out:
        write_report(found, out, baseline=baseline)
    if as_json:
        sys.stdout.write(json.dumps(full_report(found, baseline), indent=2, allow_nan=False) + "\n")
    else:
        Terminal().print(table(found, baseline))
