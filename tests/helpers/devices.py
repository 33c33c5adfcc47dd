"""Where the backends of attention run in the tests."""

import os

import torch


def device_of(backend: str) -> str:
    """Returns the device for a backend: Triton's kernels run on a GPU if there is one, unless they are interpreted."""
    on_gpu = backend == "triton" and torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
    return "cuda" if on_gpu else "cpu"
