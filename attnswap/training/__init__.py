"""Fine-tune a patched model from a recipe, with ``transformers.Trainer``.

>>> from attnswap.training import load_config, train
>>> result = train(load_config("recipes/ssmax.yaml", ["training.max_steps=20"]))  # doctest: +SKIP
"""

from attnswap.training.config import TrainConfig, load_config, parse_config
from attnswap.training.data import Data, load_data
from attnswap.training.distill import Distillation
from attnswap.training.durable import DurableCheckpoints, latest_checkpoint
from attnswap.training.fitting import fit
from attnswap.training.loss import chunked_loss
from attnswap.training.nonfinite import SkipNonFinite
from attnswap.training.protect import Protection, protect
from attnswap.training.ramp import RampSchedule
from attnswap.training.run import TrainResult, train
from attnswap.training.sections import FitSection, LossSection, RampSection, StageSection
from attnswap.training.signals import StopOnSignal
from attnswap.training.stages import Stage, Stages, plan_stages
from attnswap.training.teacher import Teacher, teacher_of
from attnswap.training.trainer import SwapTrainer

__all__ = [
    "Data",
    "Distillation",
    "DurableCheckpoints",
    "FitSection",
    "LossSection",
    "Protection",
    "RampSchedule",
    "RampSection",
    "SkipNonFinite",
    "Stage",
    "StageSection",
    "Stages",
    "StopOnSignal",
    "SwapTrainer",
    "Teacher",
    "TrainConfig",
    "TrainResult",
    "chunked_loss",
    "fit",
    "latest_checkpoint",
    "load_config",
    "load_data",
    "parse_config",
    "plan_stages",
    "protect",
    "teacher_of",
    "train",
]
