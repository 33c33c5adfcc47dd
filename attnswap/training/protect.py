"""Protect long runs from crashes, preemption and non-finite steps, with any trainer."""

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
        checkpoints: Writes checkpoints atomically.
        stop: Saves a checkpoint and stops on SIGTERM.
        finite: Skips steps whose loss or gradient is not finite.
    """

    checkpoints: DurableCheckpoints
    stop: StopOnSignal
    finite: SkipNonFinite


def protect(trainer: Trainer) -> Protection:
    """Adds callbacks to a trainer: atomic checkpoints, a clean stop on SIGTERM, and no steps that are not finite.

    Works with ``transformers.Trainer`` and its subclasses, such as TRL's ``SFTTrainer``; each callback can also be
    added alone.

    Args:
        trainer: A trainer before training. Only this instance is changed.

    Returns:
        The callbacks.
    """
    protection = Protection(DurableCheckpoints(trainer), StopOnSignal(), SkipNonFinite())
    for callback in (protection.finite, protection.stop, protection.checkpoints):
        if callback is protection.finite and getattr(trainer, "is_deepspeed_enabled", False):
            warnings.warn(
                "DeepSpeed takes its step before gradients can be checked: non-finite steps are not skipped",
                stacklevel=2,
            )
            continue
        trainer.add_callback(callback)
    return protection
