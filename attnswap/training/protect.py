"""Everything that keeps a long run's work, on any trainer."""

import warnings
from dataclasses import dataclass

from transformers import Trainer

from attnswap.training.durable import DurableCheckpoints
from attnswap.training.nonfinite import SkipNonFinite
from attnswap.training.signals import StopOnSignal


@dataclass(frozen=True)
class Protection:
    """The callbacks that :func:`protect` added.

    Attributes:
        checkpoints: Writes whole checkpoints or none.
        stop: Stops after a step on SIGTERM.
        finite: Leaves out steps that are not finite.
    """

    checkpoints: DurableCheckpoints
    stop: StopOnSignal
    finite: SkipNonFinite


def protect(trainer: Trainer) -> Protection:
    """Adds to a trainer what keeps its work: whole checkpoints, a stop on SIGTERM, no step that is not finite.

    Works with ``transformers.Trainer`` and its subclasses, such as TRL's ``SFTTrainer``; each callback can also be
    added alone.

    Args:
        trainer: Before training. This instance is changed, no other.

    Returns:
        The callbacks.
    """
    protection = Protection(DurableCheckpoints(trainer), StopOnSignal(), SkipNonFinite())
    for callback in (protection.finite, protection.stop, protection.checkpoints):
        if callback is protection.finite and getattr(trainer, "is_deepspeed_enabled", False):
            warnings.warn("DeepSpeed steps before a gradient can be looked at: steps are not left out", stacklevel=2)
            continue
        trainer.add_callback(callback)
    return protection
