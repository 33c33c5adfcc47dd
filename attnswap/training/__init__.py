"""Fine-tune a swapped model from a recipe, on ``transformers.Trainer``.

>>> from attnswap.training import load_config, train
>>> result = train(load_config("recipes/ssmax.yaml", ["training.max_steps=20"]))  # doctest: +SKIP
"""

from attnswap.training.config import TrainConfig, load_config, parse_config
from attnswap.training.data import Data, load_data
from attnswap.training.loss import chunked_loss
from attnswap.training.run import TrainResult, train
from attnswap.training.trainer import SwapTrainer

__all__ = [
    "Data",
    "SwapTrainer",
    "TrainConfig",
    "TrainResult",
    "chunked_loss",
    "load_config",
    "load_data",
    "parse_config",
    "train",
]
