"""The tile sizes of the kernels: one place that the launcher and the ahead-of-time check both ask."""

from dataclasses import dataclass

KERNELS = ("forward", "forward_rows", "backward_queries", "backward_keys")
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


TABLE: dict[tuple[str, int, int], tuple[Tiles, Tiles, Tiles, Tiles]] = {
    ("sm_80", 2, 64): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 1)),
    ("sm_80", 2, 128): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 3), Tiles(64, 32, 8, 1)),
    ("sm_90", 2, 64): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 1)),
    ("sm_90", 2, 128): (Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 1), Tiles(128, 64, 8, 2), Tiles(32, 128, 8, 1)),
    ("sm_100", 2, 64): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 1)),
    ("sm_100", 2, 128): (Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 1)),
    ("gfx942", 2, 64): (Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1)),
    ("gfx942", 2, 128): (Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1)),
    ("gfx942", 4, 64): (Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(32, 64, 4, 1)),
    ("gfx942", 4, 128): (Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1)),
    ("sm_80", 4, 64): (Tiles(32, 64, 16, 2), Tiles(64, 32, 16, 2), Tiles(64, 32, 16, 2), Tiles(32, 32, 8, 1)),
    ("sm_80", 4, 128): (Tiles(32, 16, 8, 2), Tiles(32, 32, 16, 2), Tiles(32, 32, 8, 2), Tiles(32, 32, 8, 1)),
    ("sm_90", 4, 64): (Tiles(32, 32, 8, 2), Tiles(32, 64, 16, 2), Tiles(32, 64, 16, 2), Tiles(32, 32, 8, 1)),
    ("sm_90", 4, 128): (Tiles(32, 32, 16, 2), Tiles(32, 32, 16, 2), Tiles(32, 32, 16, 2), Tiles(16, 32, 8, 2)),
    ("sm_100", 4, 64): (Tiles(32, 64, 8, 2), Tiles(32, 64, 16, 2), Tiles(64, 64, 16, 2), Tiles(32, 32, 8, 2)),
    ("sm_100", 4, 128): (Tiles(32, 32, 16, 2), Tiles(32, 32, 16, 2), Tiles(32, 32, 16, 2), Tiles(16, 32, 8, 2)),
}
"""By target, bytes of a number and head width: the sizes for each of :data:`KERNELS`.

They were found by compiling: the first of a list of sizes, large ones first, at which the swaps spilled no registers
and shared memory fitted; ``results/triton/`` names those that spill a little nonetheless. They were not timed,
since no GPU was at hand. On sm_90 the forward keeps three tiles in flight: its registers leave room for one program on
a processor, so that the shared memory is free. ``backward_keys`` has 64 keys or more there for each four warps, as the
matrix instruction takes them; with fewer, the compiler computes each tile of scores twice. Exact fp32 products use no
tensor cores on NVIDIA and hold their operands in registers, which asks for smaller tiles and more warps.
"""


def tiles_of(kernel: str, arch: str, width: int, itemsize: int) -> Tiles:
    """Returns the sizes for a kernel of :data:`KERNELS`.

    Args:
        kernel: Its name.
        arch: ``"sm_90"``, ``"gfx942"`` and the like; others take the sizes of the target in :data:`TABLE` that they
            are most like, consumer cards those of sm_80, which fit their smaller shared memory.
        width: The larger of head and value width.
        itemsize: Bytes of one input number: 2 or 4.
    """
    if padded(width) > 128:  # outside the committed table; gfx942 spills a little here
        small = itemsize == 4 and not arch.startswith("gfx")
        return Tiles(16, 16, 8, 2) if small else Tiles(32, 32, 4 if arch.startswith("gfx") else 8, 1)
    if arch.startswith("gfx"):
        like = "gfx942"
    else:
        like = {"9": "sm_90", "10": "sm_100"}.get(arch.removeprefix("sm_")[:-1], "sm_80")
    return TABLE[like, itemsize, max(64, padded(width))][KERNELS.index(kernel)]
