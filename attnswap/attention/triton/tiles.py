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

    def __str__(self) -> str:
        stages = "stage" if self.num_stages == 1 else "stages"
        return f"{self.rows}x{self.keys}, {self.num_warps} warps, {self.num_stages} {stages}"


def padded(width: int) -> int:
    """Returns the power of two that holds a head width, at least what a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


def tiles_of(kernel: str, arch: str, width: int, itemsize: int) -> Tiles:
    """Returns the sizes for a kernel of :data:`KERNELS`.

    They were found by compiling for every target until nothing spilled and shared memory fitted, not by timing, since
    no GPU was at hand (``recipes/results/triton/``). Exact fp32 products use no tensor cores on NVIDIA, and hold whole
    rows in registers: they want small tiles and many warps.

    Args:
        kernel: Its name.
        arch: ``"sm_90"``, ``"gfx942"`` and the like.
        width: The larger of head and value width.
        itemsize: Bytes of one input number: 2 or 4.
    """
    wide = padded(width) > 64
    if padded(width) > 128:
        return Tiles(32, 32, num_warps=16 if itemsize == 4 else 8, num_stages=1)
    if arch.startswith("gfx"):
        small = itemsize == 4 and wide and kernel == "backward_keys"
        return Tiles(32, 32, num_stages=1) if small else Tiles(num_stages=1)
    if itemsize == 4:
        if wide or kernel == "backward_keys":
            return Tiles(32, 32, num_warps=16 if kernel == "backward_queries" else 8, num_stages=1)
        return Tiles(num_warps=16, num_stages=1)
    if kernel != "backward_keys":
        return Tiles(rows=128, num_warps=8)
    # Two groups of warps share a Hopper tile by its rows.
    return Tiles(rows=128 if arch == "sm_90" and wide else 64, num_warps=8, num_stages=1)
