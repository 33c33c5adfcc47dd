"""Experiments in healing: a patched model is trained, its control too, and both are compared on the same tokens."""

from attnswap.healing.experiment import Experiment
from attnswap.healing.result import summarise_healing
from attnswap.healing.run import heal

__all__ = ["Experiment", "heal", "summarise_healing"]
