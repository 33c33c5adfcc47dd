"""Where a run writes: beside its output directory while it works, under its name only once it is complete."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from attnswap.disk import sync
from attnswap.errors import ConfigError
from attnswap.folders import check_replaceable, check_writable
from attnswap.training.config import TrainConfig, as_run
from attnswap.training.durable import latest_checkpoint
from attnswap.training.strict import dump_yaml

RESULT, UNFINISHED = ("recipe.yaml", "summary.json"), ("recipe.yaml",)
"""The files that a result, and a run that is not complete, are told by."""
REPLACED = ".replaced"
"""In a result, until it is removed: the result that was there before."""


class Output:
    """The directory of a result, and the ``.partial`` one beside it that becomes it.

    Args:
        final: The directory of the result.
        overwrite: Whether what is there may be replaced.
    """

    def __init__(self, final: Path, *, overwrite: bool) -> None:
        # Links are followed, so that the folder is replaced and not the link.
        self.final = Path(os.path.realpath(final.expanduser()))
        self.partial = self.final.parent / f"{self.final.name}.partial"
        self.overwrite = overwrite

    def check(self, resume_from: str | None) -> None:
        """Refuses a directory that is taken, before any work is done.

        Args:
            resume_from: The checkpoint to go on from, if any.

        Raises:
            ConfigError: There is a result, an unfinished run or something else in the way, or no such checkpoint.
        """
        self.check_place()
        if not self.overwrite and _holds(self.final):
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

    def check_place(self) -> None:
        """Refuses a directory that no run may write to or remove, also where overwriting is allowed.

        Raises:
            ConfigError: It cannot be written, cannot be replaced, or holds what no run of ours has left.
        """
        for folder in (self.final, self.final.parent):  # both are written to when the one is renamed
            check_writable(folder, "output_dir")
        check_replaceable(self.final, "output_dir")
        for folder, files in ((self.final, RESULT), (self.partial, UNFINISHED)):
            foreign = os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir())
            if foreign or (_holds(folder) and not all((folder / name).is_file() for name in files)):
                raise ConfigError(
                    f'output_dir: "{folder}" holds no {"result" if files == RESULT else "run"} of attnswap (there is '
                    f"no {' and '.join(files)}), so it is not replaced: name another one, or move it away yourself"
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
        aside = self.partial / REPLACED
        if self.final.is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.final, aside)
        os.replace(self.partial, self.final)
        sync(self.final.parent)
        # Only now: until the result has its name, a run that is killed goes on from them.
        for gone in [*self.final.glob("checkpoint-*"), *self.final.glob(".*-checkpoint-*"), self.final / REPLACED]:
            shutil.rmtree(gone, ignore_errors=gone.name == REPLACED)


def _holds(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _write_recipe(config: TrainConfig, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(dump_yaml(as_run(config)), encoding="utf-8")


def _resumable(checkpoint: Path) -> bool:
    """Whether a checkpoint has the optimizer's state, by the names Trainer, FSDP and DeepSpeed give it."""
    states = [*checkpoint.glob("*optimizer*"), *checkpoint.glob("global_step*")]
    return (checkpoint / "trainer_state.json").is_file() and bool(states)
