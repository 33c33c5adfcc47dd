"""The output directory of a run, which gets its final name only when the run is complete."""

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
"""Files by which a result, and an unfinished run, are recognised."""
REPLACED = ".replaced"
"""Name, inside a new result, of the result that it replaced, until that is removed."""


class Output:
    """The directory of a result, and the ``.partial`` directory beside it, which is renamed to it at the end.

    Args:
        final: The directory of the result.
        overwrite: Whether an existing result or unfinished run may be replaced.
    """

    def __init__(self, final: Path, *, overwrite: bool) -> None:
        # Symbolic links are resolved, so that the folder is replaced and not the link.
        self.final = Path(os.path.realpath(final.expanduser()))
        self.partial = self.final.parent / f"{self.final.name}.partial"
        self.overwrite = overwrite

    def check(self, resume_from: str | None) -> None:
        """Checks, before any work is done, that the run may use the directory.

        Args:
            resume_from: The checkpoint to resume from, if any.

        Raises:
            ConfigError: The directory has a result, an unfinished run or other files, or the checkpoint cannot be
                resumed.
        """
        self.check_folder()
        if not self.overwrite and _has_files(self.final):
            raise ConfigError(f'output_dir: "{self.final}" is not empty: name another one, or set overwrite=true')
        if resume_from is not None:
            if not _resumable(Path(resume_from)):
                raise ConfigError(
                    f'training.resume_from_checkpoint: "{resume_from}" is not a checkpoint with an optimizer state '
                    "(training.save_only_model leaves it out): name another one, or start anew with overwrite=true"
                )
            return
        latest = latest_checkpoint(self.partial)
        if latest is not None and not self.overwrite:
            raise ConfigError(
                f'output_dir: there is an unfinished run with the checkpoint "{latest}": '
                + ("resume it with training.resume_from_checkpoint=latest, or " if _resumable(latest) else "")
                + "start anew with overwrite=true"
            )

    def check_folder(self) -> None:
        """Checks that the directory may be written and replaced at all, even if overwriting is allowed.

        Raises:
            ConfigError: The directory cannot be written or replaced, or has files that are not from a run.
        """
        for folder in (self.final, self.final.parent):  # renaming the one writes to the other
            check_writable(folder, "output_dir")
        check_replaceable(self.final, "output_dir")
        for folder, files in ((self.final, RESULT), (self.partial, UNFINISHED)):
            foreign = os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir())
            if foreign or (_has_files(folder) and not all((folder / name).is_file() for name in files)):
                raise ConfigError(
                    f'output_dir: "{folder}" is not a {"result" if files == RESULT else "run"} of attnswap (it has no '
                    f"{' and '.join(files)}), so that it is not replaced: name another directory, or move this one away"
                )

    def prepare(self, config: TrainConfig, resume_from: str | None) -> None:
        """Creates the partial directory, empty unless a run is resumed, and writes the recipe into it."""
        if resume_from is None and self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        _write_recipe(config, self.partial)

    def publish(
        self, config: TrainConfig, log: list[dict[str, Any]], movement: dict[str, Any], summary: dict[str, Any]
    ) -> None:
        """Writes the reports beside the saved model, renames the directory, and removes the checkpoints.

        Args:
            config: The recipe as it was run.
            log: All log entries.
            movement: How far each swap parameter moved.
            summary: The summary of the run.
        """
        (self.partial / "training_args.bin").unlink(missing_ok=True)  # a pickle; recipe.yaml has the same values
        _write_recipe(config, self.partial)
        for name, content in (("training_log", log), ("movement", movement), ("summary", summary)):
            text = json.dumps(content, indent=2) + "\n"
            (self.partial / f"{name}.json").write_text(text, encoding="utf-8")
        for path in self.partial.iterdir():
            if path.is_file():
                sync(path)
        sync(self.partial)
        replaced = self.partial / REPLACED
        if self.final.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.final, replaced)
        os.replace(self.partial, self.final)
        sync(self.final.parent)
        # Not earlier: a run that is killed before the renaming is resumed from them.
        for gone in [*self.final.glob("checkpoint-*"), *self.final.glob(".*-checkpoint-*"), self.final / REPLACED]:
            shutil.rmtree(gone, ignore_errors=gone.name == REPLACED)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _write_recipe(config: TrainConfig, folder: Path) -> None:
    (folder / "recipe.yaml").write_text(dump_yaml(as_run(config)), encoding="utf-8")


def _resumable(checkpoint: Path) -> bool:
    """Whether a checkpoint has an optimizer state, under one of the names of Trainer, FSDP and DeepSpeed."""
    states = [*checkpoint.glob("*optimizer*"), *checkpoint.glob("global_step*")]
    return (checkpoint / "trainer_state.json").is_file() and bool(states)
