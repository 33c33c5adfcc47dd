"""The tile sizes of the kernels: one place that the launcher and the ahead-of-time check both ask."""

from dataclasses import dataclass

KERNELS = ("forward", "backward_queries", "backward_keys")
WIDEST = 256
"""The largest head width the kernels take."""


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut up.

    Attributes:
        rows: Queries in a tile.
        keys: Keys in a tile.
        num_warps: Warps of one program.
        num_stages: Tiles in flight; 1 loads a tile when it is needed.
    """

    rows: int = 64
    keys: int = 64
    num_warps: int = 4
    num_stages: int = 2


def padded(width: int) -> int:
    """Returns the power of two that holds a head width, at least what a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


def tiles_of(kernel: str, backend: str, width: int, itemsize: int) -> Tiles:
    """Returns the sizes for a kernel of :data:`KERNELS`.

    Chosen by compiling for every target until nothing spilled and shared memory fitted, not by timing: no GPU was at
    hand (see ``recipes/results/triton/``).

    Args:
        kernel: Its name.
        backend: ``"cuda"`` or ``"hip"``.
        width: The larger of head and value width.
        itemsize: Bytes of one input number: 2 or 4.
    """
    return Tiles()
