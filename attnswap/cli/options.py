"""Parsers of option values that several commands share. A bad value is an error before any work starts."""

from pathlib import Path
from typing import TYPE_CHECKING

from attnswap.errors import ConfigError, nearest
from attnswap.folders import check_writable

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def parse_dtype(text: str | None) -> "torch.dtype | None":
    """Returns the dtype of a short (``bf16``) or long (``bfloat16``) name; None stays None.

    Raises:
        ConfigError: There is no such dtype.
    """
    if text is None:
        return None
    import torch

    names = DTYPES | {name: name for name in DTYPES.values()}
    if text not in names:
        raise ConfigError(f'unknown dtype "{text}".{nearest(text, list(names))} Known: {", ".join(names)}')
    return getattr(torch, names[text])  # type: ignore[no-any-return]


def parse_device(text: str | None) -> str:
    """Returns the device of a name; None means the accelerator of this machine, or the CPU if there is none.

    Raises:
        ConfigError: torch does not know the name, or this machine has no such device.
    """
    import torch

    from attnswap.devices import default_device

    here = list(dict.fromkeys(["cpu", default_device()]))
    try:
        device = torch.device(text or here[-1])
    except RuntimeError:
        raise ConfigError(f'unknown device "{text}".{nearest(str(text), here)} Known: {", ".join(here)}') from None
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.type not in here or (device.index or 0) >= count:
        raise ConfigError(f'this machine has no device "{text}", only {", ".join(here)}')
    return str(device)


def check_folder(out: Path | None, name: str = "--out") -> None:
    """Raises ConfigError if the folder that an option names is not writable. The folder need not exist yet."""
    if out is not None:
        check_writable(out, name)


def parse_numbers(text: str | None, name: str) -> list[int] | None:
    """Reads a list such as ``0,2``; None stays None.

    Raises:
        ConfigError: The text is not a list of whole numbers.
    """
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f'{name} "{text}" is not a list of numbers such as 0,2') from None


def parse_size(text: str) -> int:
    """Reads a number of tokens such as ``512``, ``8k`` (8192) or ``1m``.

    Raises:
        ConfigError: The text is not a number of tokens, or it is 0.
    """
    value = text.strip().lower()
    digits, factor = (value[:-1], {"k": 1024, "m": 1 << 20}[value[-1]]) if value[-1:] in ("k", "m") else (value, 1)
    if not digits.isascii() or not digits.isdigit() or not int(digits):
        raise ConfigError(f'"{text}" is not a number of tokens: write it as 512, 8k or 1m (k is 1024)')
    return int(digits) * factor
