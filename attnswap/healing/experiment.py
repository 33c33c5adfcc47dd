"""The definition of an experiment: a recipe, its control, and the text to measure on."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attnswap.errors import ConfigError
from attnswap.evaluation import CONTEXTS
from attnswap.healing.comparable import recipe_differences
from attnswap.text import evaluation_text
from attnswap.training.config import TrainConfig, load_config, to_mapping
from attnswap.training.stages import control_stages, stages_of

SWAP_KEYS = ("swap", "part", "layers", "heads", "fit")
"""Keys of a recipe that its control leaves out."""
SEED = 42
"""Default seed of Trainer."""


@dataclass(frozen=True)
class Experiment:
    """A recipe, and how its models are measured.

    Attributes:
        config: The recipe, with a swap.
        out: Directory of models and measurements. Those of the same recipe that are there already are used again.
        control: Directory of a control that was trained with the same recipe without its swap; None: train one.
        text: The text to measure on; None: the offline evaluation text.
        text_id: Name of the text in reports.
        contexts: Context lengths in tokens.
        max_tokens: Maximum number of scored tokens per context.
        dtype: Dtype of the models for the measurements.
        device: Device of the measurements; None: the accelerator if there is one.
    """

    config: TrainConfig
    out: Path
    control: Path | None = None
    text: str | None = None
    text_id: str | None = None
    contexts: tuple[int, ...] = CONTEXTS
    max_tokens: int = 16384
    dtype: torch.dtype = torch.bfloat16
    device: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out.expanduser())  # as for output_dir in training
        if self.config.swap is None:
            raise ConfigError('swap: an experiment heals a swap; for the control alone, run "attnswap train"')
        if self.config.ramp != 1.0:
            raise ConfigError(
                f"ramp: an experiment compares models at a lambda of 1, not {self.config.ramp}: leave it out, and give "
                "a stage a ramp to begin at a lower lambda"
            )
        if self.control is not None:
            self._check_control(self.control)

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return int(self.config.training.get("seed", SEED))

    @property
    def text_sha256(self) -> str:
        """Hash of the text to measure on."""
        text = evaluation_text() if self.text is None else self.text
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def control_learns(self) -> bool:
        """Whether the recipe trains anything without its swap. If not, the control is the original model."""
        plan = stages_of(self.config)
        return self.config.optimizer.freeze == "none" and (not plan or bool(control_stages(plan)))

    @property
    def control_config(self) -> TrainConfig:
        """The recipe without its swap."""
        changes: dict[str, Any] = dict.fromkeys(SWAP_KEYS)
        return replace(self.config, **changes, output_dir=str(self.out / "control"))

    def _check_control(self, folder: Path) -> None:
        if not self.control_learns:
            raise ConfigError("--control: leave it out, since this recipe trains nothing without its swap")
        try:
            theirs = to_mapping(load_config(folder / "recipe.yaml"))
        except ConfigError as error:
            raise ConfigError(f"--control: {error}") from None
        different = recipe_differences(to_mapping(self.control_config), theirs)
        if different:
            raise ConfigError(
                f'--control: "{folder}" was not trained with this recipe without its swap; the two differ in '
                f"{', '.join(different)}: name another control, or leave it out to train one"
            )
