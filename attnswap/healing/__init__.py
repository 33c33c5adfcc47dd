"""Experiments in healing: a swapped model beside its controls, and what the comparison says."""

from attnswap.healing.experiment import Experiment, heal
from attnswap.healing.result import summarise_healing

__all__ = ["Experiment", "heal", "summarise_healing"]
