"""Values that several commands read from their options, checked before any work is done."""

from pathlib import Path

import torch

from attnswap.devices import default_device
from attnswap.errors import ConfigError, nearest
from attnswap.folders import check_writable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def parse_dtype(text: str | None) -> torch.dtype | None:
    """Returns the dtype of a short (``bf16``) or long (``bfloat16``) name; None stays None.

    Raises:
        ConfigError: There is no such dtype.
    """
    if text is None:
        return None
    names = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if text not in names:
        raise ConfigError(f'unknown dtype "{text}".{nearest(text, list(names))} There are {", ".join(names)}')
    return names[text]


def parse_device(text: str | None) -> str:
    """Returns a device that this machine has; None: its accelerator if there is one, else the CPU.

    Raises:
        ConfigError: The name is none of torch's, or this machine has no such device.
    """
    here = list(dict.fromkeys(["cpu", default_device()]))
    try:
        device = torch.device(text or here[-1])
    except RuntimeError:
        raise ConfigError(f'unknown device "{text}".{nearest(str(text), here)} There are {", ".join(here)}') from None
    count = 1 if device.type == "cpu" else torch.accelerator.device_count()
    if device.type not in here or (device.index or 0) >= count:
        raise ConfigError(f'there is no device "{text}" here; there are {", ".join(here)}')
    return str(device)


def check_folder(out: Path | None, name: str = "--out") -> None:
    """Raises ConfigError if nothing can be written into a folder that an option names; it need not be there yet."""
    if out is not None:
        check_writable(out, name)


def parse_numbers(text: str | None, name: str) -> list[int] | None:
    """Reads a list such as ``0,2``; None stays None.

    Raises:
        ConfigError: It is no such list.
    """
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f'{name} "{text}" is no list of numbers such as 0,2') from None


def parse_size(text: str) -> int:
    """Reads a number of tokens such as ``512``, ``8k`` (8192) or ``1m``.

    Raises:
        ConfigError: It is no such number.
    """
    value = text.strip().lower()
    digits, factor = (value[:-1], {"k": 1024, "m": 1 << 20}[value[-1]]) if value[-1:] in ("k", "m") else (value, 1)
    if not digits.isascii() or not digits.isdigit() or not int(digits):
        raise ConfigError(f'"{text}" is no number of tokens: write it as 512, 8k or 1m (k is 1024)')
    return int(digits) * factor
