"""Which device to compute on, whether it computes well in bf16, and whether it still answers."""

import warnings

import torch

from attnswap.errors import first_line


def default_device() -> str:
    """Returns the type of this machine's accelerator, or "cpu"."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def has_bf16_instructions(device: str | torch.device) -> bool:
    """Whether a device multiplies bf16 matrices in hardware.

    Every accelerator counts as one that does. A CPU without such instructions is many times slower in bf16 than in
    fp32.
    """
    if torch.device(device).type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_of_slow_bf16(device: str | torch.device, advice: str) -> None:
    """Warns before a computation in bf16 on a device without bf16 instructions.

    Args:
        device: Where the computation will run.
        advice: What to do instead; the end of the warning.
    """
    if not has_bf16_instructions(device):
        warnings.warn(
            "this processor has no bf16 instructions (AMX, AVX512) and is many times slower in bf16 than in fp32: "
            + advice,
            stacklevel=3,
        )


def gpu_failure() -> str | None:
    """Returns why this process can no longer use the GPU, or None.

    After an illegal access every further call of the process fails, whatever it computes.
    """
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:
        return first_line(error)
    return None
