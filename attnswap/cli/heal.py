"""``attnswap heal``: train a healing recipe and its control, and measure both."""

from pathlib import Path
from typing import Annotated

import typer

from attnswap.cli.terminal import Terminal


def heal_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe with stages, such as recipes/heal/softpick.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override values of the recipe.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="Control already trained with the same recipe. Default: train one.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens; k is 1024.")] = "512,1k,2k,4k,8k",
    max_tokens: Annotated[str, typer.Option(help="Number of tokens to score at each context length.")] = "16k",
    text: Annotated[Path | None, typer.Option(help="Text file to measure on. Default: the built-in text.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype to measure in: fp32, bf16 or fp16. Default: bf16, or fp32 on a CPU without bf16."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Device to measure on. Default: the accelerator, or cpu if there is none.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Earlier result.json: fail if a ratio to the control is outside its interval.")
    ] = None,
) -> None:
    """Heal a swapped model and compare it with a control: the unpatched model, trained by the stages with kl or ce.

    Trains the recipe and its control. Measures the original, the control, the swapped model before healing (also after
    the fit, if there is one), the healed model, and the healed model without the swap. Finished parts in the recipe's
    output_dir are reused, so the same command resumes an interrupted run.
    """
    import torch

    from attnswap.cli.options import parse_device, parse_dtype, parse_size
    from attnswap.devices import has_bf16_instructions
    from attnswap.distributed import destroy_process_group, rank_and_world_size
    from attnswap.evaluation.corpus import read_text
    from attnswap.healing import Experiment, heal, summarise_healing
    from attnswap.healing.report import table, write
    from attnswap.healing.rerun import check_rerun, compare_with_committed, read_committed
    from attnswap.training import load_config

    config = load_config(recipe, overrides or [])
    placed = parse_device(device)
    default = torch.bfloat16 if has_bf16_instructions(placed) else torch.float32
    experiment = Experiment(
        config=config,
        out=Path(config.output_dir).expanduser(),
        control=control,
        text=None if text is None else read_text(text),
        text_id=None if text is None else text.name,
        contexts=tuple(parse_size(part) for part in contexts.split(",")),
        max_tokens=parse_size(max_tokens),
        dtype=parse_dtype(dtype) or default,
        device=None if device is None else placed,
    )
    committed = None if check is None else read_committed(check)
    if committed is not None:
        check_rerun(experiment, committed)
    try:
        result = summarise_healing(experiment, heal(experiment))
        first = rank_and_world_size()[0] == 0
    finally:
        destroy_process_group()
    if first:
        folder = experiment.out / "result"
        write(result, folder, experiment.out / "healed")
        console = Terminal()
        console.print(table(result))
        console.print(f"written to {folder}", soft_wrap=True)
        if committed is not None:
            for line in compare_with_committed(result, committed):
                console.print(line, soft_wrap=True)
