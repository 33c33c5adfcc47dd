"""``attnswap eval``: perplexity and bits per byte of a checkpoint at several context lengths."""

from pathlib import Path
from typing import Annotated

import typer

from attnswap.cli.options import check_folder, parse_device, parse_dtype, parse_size
from attnswap.errors import ConfigError


def eval_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help='Checkpoint directory, GGUF file, hub name or "embedded".')
    ],
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens; k is 1024.")] = "512,1k,2k,4k,8k",
    text: Annotated[Path | None, typer.Option(help="Text file to measure on. Default: the built-in text.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Dataset to measure on, NAME[:CONFIG[:SPLIT]].")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Compare with this model, or with the JSON of an earlier evaluation.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: dtype of the checkpoint.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device. Default: the accelerator, or cpu if there is none.")
    ] = None,
    stride: Annotated[
        str | None,
        typer.Option(help="Tokens between lm-eval's rolling windows. Default: score the second half of each window."),
    ] = None,
    max_tokens: Annotated[str | None, typer.Option(help="Score at most this many tokens, such as 16k.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 1,
    suite: Annotated[
        str | None,
        typer.Option(help='"long": retrieval, attention structure, KL, context gain, weight rounding; HTML page.'),
    ] = None,
    prompts: Annotated[
        int, typer.Option(min=1, help="With --suite: retrieval prompts per task, length and depth.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Random seed of the prompts and of the bootstrap.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the report: JSON, loss of each token, Markdown table, plot.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only the report, as JSON.")] = False,
) -> None:
    """Measure perplexity at several context lengths over the same tokens.

    At each length the same tokens are scored, each once and with at least half a window of context. The ratio to a
    baseline has a paired block-bootstrap interval.
    """
    from attnswap.cli.measurement import Measurement, evaluate
    from attnswap.distributed import init_process_group
    from attnswap.evaluation.corpus import read_dataset, read_text

    if text and dataset:
        raise ConfigError("give --text or --dataset, not both")
    if batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, not {batch_size}")
    if suite not in (None, "long"):
        raise ConfigError(f'unknown suite "{suite}": --suite takes "long"')
    check_folder(out)
    shared = init_process_group(device)
    measurement = Measurement(
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
                "--suite runs in one process, with its own windows and batch size: leave out --stride and --batch-size"
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
    evaluate(measurement, model, baseline, out, as_json)
