"""What is asked of one recipe with its controls."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from attnswap.errors import ConfigError
from attnswap.evaluation import CONTEXTS
from attnswap.healing.alike import differences
from attnswap.text import evaluation_text
from attnswap.training.config import TrainConfig, load_config, to_mapping
from attnswap.training.stages import plan_of, without_swaps

SWAP_KEYS = ("swap", "part", "layers", "heads", "fit")
"""What a recipe and its control differ in."""
SEED = 42
"""Trainer's own, of recipes that name none."""


@dataclass(frozen=True)
class Experiment:
    """What is measured of a recipe, and where.

    Attributes:
        config: The recipe, with a swap.
        out: Where models and measurements go; what is there already of the same recipe is not done again.
        control: The finished control of another swap's experiment with the same recipe; None: train one.
        text: The text to measure on; None: the offline evaluation text.
        text_id: Its name in reports.
        contexts: Context lengths in tokens.
        max_tokens: Scored tokens at each.
        dtype: Dtype of the models when measured.
        device: Where they are measured; None: this process's accelerator if there is one.
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
        object.__setattr__(self, "out", self.out.expanduser())  # as training does
        if self.config.swap is None:
            raise ConfigError('swap: an experiment heals a swap; for the control alone, run "attnswap train"')
        if self.config.ramp != 1.0:
            raise ConfigError(
                f"ramp: at a lambda of {self.config.ramp} the model is healed of a part of the swap only, and the swap "
                "without healing is measured whole: leave it out, and give a stage a ramp to begin lower"
            )
        if self.control is not None:
            self._check_control(self.control)

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return int(self.config.training.get("seed", SEED))

    @property
    def text_sha256(self) -> str:
        """What identifies the text to measure on."""
        text = evaluation_text() if self.text is None else self.text
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def control_learns(self) -> bool:
        """Whether the recipe trains anything without its swap; if not, its control is the original."""
        plan = plan_of(self.config)
        return self.config.optimizer.freeze == "none" and (not plan or bool(without_swaps(plan)))

    @property
    def control_config(self) -> TrainConfig:
        """The recipe without its swap."""
        changes: dict[str, Any] = dict.fromkeys(SWAP_KEYS)
        return replace(self.config, **changes, output_dir=str(self.out / "control"))

    def _check_control(self, folder: Path) -> None:
        if not self.control_learns:
            raise ConfigError("--control: without its swap this recipe trains nothing, so its control is the original")
        try:
            theirs = to_mapping(load_config(folder / "recipe.yaml"))
        except ConfigError as error:
            raise ConfigError(f"--control: {error}") from None
        different = differences(to_mapping(self.control_config), theirs)
        if different:
            raise ConfigError(
                f'--control: "{folder}" was trained otherwise than this recipe without its swap: {", ".join(different)}'
            )
