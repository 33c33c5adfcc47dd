"""The seam to transformers: patch, undo, save and reload."""

from attnswap.surgery.bypass import bypassed
from attnswap.surgery.checkpoint import from_pretrained
from attnswap.surgery.install import install
from attnswap.surgery.move import set_ramp
from attnswap.surgery.parameters import parameter_groups, swap_parameters
from attnswap.surgery.patch import describe, patch, unpatch
from attnswap.surgery.report import PatchReport
from attnswap.surgery.seam import register
from attnswap.surgery.spec import KEY

register()
install()

__all__ = [
    "KEY",
    "PatchReport",
    "bypassed",
    "describe",
    "from_pretrained",
    "parameter_groups",
    "patch",
    "set_ramp",
    "swap_parameters",
    "unpatch",
]
