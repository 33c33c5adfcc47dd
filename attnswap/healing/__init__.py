"""Experiments in healing: a swapped model beside its controls, and what the comparison says."""

from attnswap.healing.experiment import Experiment
from attnswap.healing.result import summarise_healing
from attnswap.healing.run import heal

__all__ = ["Experiment", "heal", "summarise_healing"]
