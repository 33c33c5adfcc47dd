"""Where a run writes: beside its output directory while it works, under its name only once it is complete."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from attnswap.errors import ConfigError
from attnswap.training.config import TrainConfig, as_run
from attnswap.training.durable import latest_checkpoint, sync


class Output:
    """The directory of a result, and the ``.partial`` one beside it that becomes it.

    Args:
        final: The directory of the result.
        overwrite: Whether what is there may be replaced.
    """

    def __init__(self, final: Path, *, overwrite: bool) -> None:
        self.final = final.expanduser().absolute()
        self.partial = self.final.with_name(self.final.name + ".partial")
        self.overwrite = overwrite

    def check(self, resume_from: str | None) -> None:
        """Refuses a directory that is taken, before any work is done.

        Args:
            resume_from: The checkpoint to go on from, if any.

        Raises:
            ConfigError: There is a result, an unfinished run or a file in the way, or no such checkpoint.
        """
        if self.final.exists() and not self.final.is_dir():
            raise ConfigError(f'output_dir: "{self.final}" is a file')
        above = next(folder for folder in self.final.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK) or above.is_relative_to("/proc"):
            raise ConfigError(f'output_dir: nothing can be written to "{above}"')
        if not self.overwrite and self.final.is_dir() and any(self.final.iterdir()):
            raise ConfigError(f'output_dir: "{self.final}" is not empty: name another one, or set overwrite=true')
        if resume_from is not None:
            if not _resumable(Path(resume_from)):
                raise ConfigError(
                    f'training.resume_from_checkpoint: "{resume_from}" is no checkpoint with an optimizer state '
                    "(training.save_only_model leaves it out)"
                )
            return
        left = latest_checkpoint(self.partial)
        if left is not None and not self.overwrite:
            raise ConfigError(
                f'output_dir: an unfinished run has left "{left}": '
                + ("go on with training.resume_from_checkpoint=latest, or " if _resumable(left) else "")
                + "start anew with overwrite=true"
            )

    def prepare(self, config: TrainConfig, resume_from: str | None) -> None:
        """Makes the partial directory, empty unless a run is resumed, and writes the recipe into it."""
        if resume_from is None and self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        _write_recipe(config, self.partial)

    def publish(
        self, config: TrainConfig, log: list[dict[str, Any]], movement: dict[str, Any], summary: dict[str, Any]
    ) -> None:
        """Writes the reports beside the saved model, drops the checkpoints, and renames the whole to its final name.

        Args:
            config: The recipe as it was run.
            log: Every log entry.
            movement: How far each swap parameter moved.
            summary: The figures of the run.
        """
        (self.partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml says the same in words
        _write_recipe(config, self.partial)
        for name, content in (("training_log", log), ("movement", movement), ("summary", summary)):
            text = json.dumps(content, indent=2) + "\n"
            (self.partial / f"{name}.json").write_text(text, encoding="utf-8")
        for path in self.partial.iterdir():
            if path.is_file():
                sync(path)
        sync(self.partial)
        aside = self.final.with_name(self.final.name + ".replaced")
        if self.final.is_dir():
            shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while it removed it
            os.replace(self.final, aside)
        os.replace(self.partial, self.final)
        sync(self.final.parent)
        # Only now: until the result has its name, a run that is killed goes on from them.
        for checkpoint in [*self.final.glob("checkpoint-*"), *self.final.glob(".*-checkpoint-*")]:
            shutil.rmtree(checkpoint)
        shutil.rmtree(aside, ignore_errors=True)


def _write_recipe(config: TrainConfig, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(as_run(config), sort_keys=False), encoding="utf-8")


def _resumable(checkpoint: Path) -> bool:
    """Whether a checkpoint has the optimizer's state, by the names Trainer, FSDP and DeepSpeed give it."""
    states = [*checkpoint.glob("*optimizer*"), *checkpoint.glob("global_step*")]
    return (checkpoint / "trainer_state.json").is_file() and bool(states)
