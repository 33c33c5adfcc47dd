"""A recipe of a small experiment, and the command that runs it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from attnswap.cli import main
from tests.helpers.training import recipe

STAGES = [
    {"name": "ramp", "share": 0.7, "loss": {"ce": 0.1, "kl": 0.9}, "ramp": {"over": 0.5}},
    {"name": "long", "share": 0.3, "loss": {"ce": 0.1, "kl": 0.9}, "sequence_length": 100},
]
TEXT = "the dog lay on the floor. " * 60


def written(tmp_path: Path, **changes: Any) -> Path:
    training = {"eval_strategy": "steps", "eval_steps": 5, "save_steps": 5, "load_best_model_at_end": False}
    values = {"swap": "softpick", "stages": STAGES, "training": training} | changes
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, **values)))
    (tmp_path / "held-out.txt").write_text(TEXT)
    return path


def run(tmp_path: Path, *extra: str) -> int:
    words = [str(tmp_path / "recipe.yaml"), "--text", str(tmp_path / "held-out.txt")]
    measure = ["--contexts", "32,96", "--max-tokens", "500", "--dtype", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["attnswap", "heal", *words, *measure, *extra])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)
