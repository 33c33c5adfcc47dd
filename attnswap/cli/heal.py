"""``attnswap heal``: a healing recipe with its controls, measured."""

from pathlib import Path
from typing import Annotated

import typer

from attnswap.cli.terminal import Terminal


def heal_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe with stages, e.g. recipes/heal/softpick.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values in place of the recipe's.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="Finished control of the same recipe. Default: train one.")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens; k is 1024.")] = "512,1k,2k,4k,8k",
    max_tokens: Annotated[str, typer.Option(help="Scored tokens at each context.")] = "16k",
    text: Annotated[Path | None, typer.Option(help="Text to measure on. Default: the built-in offline text.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype to measure in: fp32, bf16 or fp16. Default: bf16, fp32 on a processor without it."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to measure. Default: the accelerator, else cpu.")] = None,
    check: Annotated[
        Path | None, typer.Option(help="A committed result.json: fail unless the ratios land in its intervals.")
    ] = None,
) -> None:
    """Heal a swap and measure it against the same recipe without it.

    Trains the recipe and its control, and measures both beside the original, the swap without healing, and the healed
    weights without the swap. What is there already in the recipe's output_dir is not done again, so a run that was
    stopped goes on with the same command.
    """
    # Here, so that --help need not wait for torch.
    import torch

    from attnswap.cli.options import parse_device, parse_dtype, parse_size
    from attnswap.devices import has_bf16_instructions
    from attnswap.distributed import destroy_process_group, rank_and_world_size
    from attnswap.evaluation.corpus import read_text
    from attnswap.healing import Experiment, heal, summarise_healing
    from attnswap.healing.report import table, write
    from attnswap.healing.rerun import check_rerun, read_committed, within
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
            for line in within(result, committed):
                console.print(line, soft_wrap=True)
