"""``attnswap patch``: patch a checkpoint and save it."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from attnswap.cli.options import check_folder, parse_dtype, parse_numbers
from attnswap.errors import ConfigError
from attnswap.visible import visible


def patch_command(
    model: Annotated[str, typer.Argument(help='Checkpoint directory, GGUF file, hub name or "embedded".')],
    out: Annotated[Path, typer.Argument(help="Directory for the patched checkpoint; it must not exist.")],
    swap: Annotated[str, typer.Option(help="Name of the swap; see `attnswap list`.")],
    option: Annotated[
        list[str] | None, typer.Option(help="Option of the swap as KEY=VALUE, such as form=scale; repeatable.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='Layers to patch: indices "0,2" or a slice "8:". Default: all.')
    ] = None,
    heads: Annotated[str | None, typer.Option(help='Query heads to patch: indices "0,1". Default: all.')] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Attention modules to patch: encoder, decoder, cross, ... Default: decoder self-attention."),
    ] = None,
    ramp: Annotated[float, typer.Option(help="lambda, from 0 (the original attention) to 1 (the swap).")] = 1.0,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the saved weights: fp32, bf16, fp16 or fp64. Default: the checkpoint's own."),
    ] = None,
) -> None:
    """Patch a checkpoint and save it with its tokenizer."""
    import attnswap
    from attnswap.loading import load_config_of, load_model, load_tokenizer
    from attnswap.surgery.move import check_ramp
    from attnswap.swaps import resolve

    if os.path.lexists(out):
        raise ConfigError(f'"{out}" exists already; choose another directory')
    check_folder(out.parent, "OUT")
    options = _options(option or [])
    if "name" in options:
        raise ConfigError("--swap names the swap, not --option name=")
    config = resolve({"name": swap, **options})
    chosen = layers if layers is None or ":" in layers else parse_numbers(layers, "--layers")
    chosen_heads = parse_numbers(heads, "--heads")
    check_ramp(ramp)
    chosen_dtype = parse_dtype(dtype)
    load_config_of(model)
    tokenizer = load_tokenizer(model)  # before the model, which is slow to load
    loaded = load_model(model, dtype=chosen_dtype)
    report = attnswap.patch(loaded, config, part=part, layers=chosen, heads=chosen_heads, ramp=ramp)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        loaded.save_pretrained(Path(partial) / "model")
        tokenizer.save_pretrained(Path(partial) / "model")
        os.rename(Path(partial) / "model", out)
    print(report)
    print(visible(f"saved to {out}"))


def _options(pairs: list[str]) -> dict[str, object]:
    from attnswap.training.strict import parse_value

    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f'"{pair}": --option takes KEY=VALUE, such as form=scale')
        options[key.strip()] = parse_value(value, f'"{key}"')
    return options
