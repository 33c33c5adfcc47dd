"""Fine-tune a swapped model from a recipe, on ``transformers.Trainer``.

>>> from attnswap.training import load_config, train
>>> result = train(load_config("recipes/ssmax.yaml", ["training.max_steps=20"]))  # doctest: +SKIP
"""

from attnswap.training.config import TrainConfig, load_config, parse_config
from attnswap.training.data import Data, load_data
from attnswap.training.durable import DurableCheckpoints, latest_checkpoint
from attnswap.training.loss import chunked_loss
from attnswap.training.nonfinite import SkipNonFinite
from attnswap.training.protect import Protection, protect
from attnswap.training.ramp import RampSchedule
from attnswap.training.run import TrainResult, train
from attnswap.training.signals import StopOnSignal
from attnswap.training.trainer import SwapTrainer

__all__ = [
    "Data",
    "DurableCheckpoints",
    "Protection",
    "RampSchedule",
    "SkipNonFinite",
    "StopOnSignal",
    "SwapTrainer",
    "TrainConfig",
    "TrainResult",
    "chunked_loss",
    "latest_checkpoint",
    "load_config",
    "load_data",
    "parse_config",
    "protect",
    "train",
]
