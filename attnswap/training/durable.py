"""Write checkpoints atomically: a checkpoint is either complete or not there.

A checkpoint is written into a hidden folder, flushed to the disk, marked as complete, and then renamed to its final
name. Only after that are older ones removed. So whenever the process is killed, the newest checkpoint is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attnswap.disk import sync
from attnswap.distributed import barrier
from attnswap.errors import CheckpointError
from attnswap.training.ramp import load_ramps, save_ramps

MARKER = "complete.json"
WRITING, REPLACED, REMOVED = ".writing", ".replaced-", ".removed-"


class DurableCheckpoints(TrainerCallback):
    """Makes a trainer write checkpoints atomically, and restore lambda when it loads one.

    ``trainer.add_callback(DurableCheckpoints(trainer))`` works with ``transformers.Trainer`` and its subclasses, in one
    process or several.

    Args:
        trainer: The trainer. Its methods for saving and loading are replaced, on this instance only.

    Raises:
        CheckpointError: The trainer lacks one of the methods that are replaced.
    """

    def __init__(self, trainer: Trainer) -> None:
        for name in ("_save_checkpoint", "_load_from_checkpoint", "_load_best_model", "_get_output_dir"):
            if not callable(getattr(trainer, name, None)):
                raise CheckpointError(
                    f"{type(trainer).__name__} has no method {name}, which DurableCheckpoints wraps: use another "
                    "version of transformers, or leave the callback out"
                )
        self.trainer = trainer
        self._past_end = False
        self._save, self._load, self._best = (
            trainer._save_checkpoint,
            trainer._load_from_checkpoint,
            trainer._load_best_model,
        )
        trainer._save_checkpoint = self.save  # type: ignore[method-assign]
        trainer._load_from_checkpoint = self.load  # type: ignore[method-assign]
        trainer._load_best_model = self.load_best  # type: ignore[method-assign]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detects a step after the last one: Trainer takes one if it is resumed at the last step within an epoch."""
        self._past_end = 0 < state.max_steps <= state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes the gradients of such a step, so that the optimizer changes nothing."""
        if self._past_end:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes such a step back from the counter."""
        if self._past_end:
            state.global_step = state.max_steps

    def save(self, model: Any, trial: Any = None) -> None:
        """Saves a checkpoint as the trainer does, into a hidden folder, and renames it once it is on the disk."""
        trainer = self.trainer
        folder = Path(trainer._get_output_dir(trial=trial))
        hidden = folder / WRITING
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        writes = trainer.args.should_save
        if writes:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
        barrier()
        with _output_dir(trainer, hidden):
            self._save(model, trial)
        barrier()
        best = trainer.state.best_model_checkpoint
        # Trainer sets this only if the folder exists, which processes see at different times.
        if trainer.state.best_global_step == trainer.state.global_step:
            trainer.state.best_model_checkpoint = str(folder / name)
        if writes:
            if best != trainer.state.best_model_checkpoint:
                trainer.state.save_to_json(str(hidden / name / TRAINER_STATE_NAME))
            save_ramps(trainer.model, hidden / name)
            mark_complete(hidden / name)
            _replace_folder(hidden / name, folder / name)
            shutil.rmtree(hidden)
            _remove_old(folder / name, trainer)
        barrier()

    def load(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Checks that a checkpoint is complete, and loads it with its lambda.

        Raises:
            CheckpointError: A file is missing or truncated.
        """
        check_complete(Path(resume_from_checkpoint))
        load_ramps(self.trainer.model, Path(resume_from_checkpoint))
        self._load(resume_from_checkpoint, model)

    def load_best(self) -> None:
        """Loads the best checkpoint, with its lambda, at the end of training."""
        if self.trainer.state.best_model_checkpoint is not None:
            load_ramps(self.trainer.model, Path(self.trainer.state.best_model_checkpoint))
        self._best()


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None.

    Args:
        folder: The trainer's ``output_dir``. A checkpoint whose replacement was interrupted is put back.
    """
    folder = Path(folder)
    for old in folder.glob(f"{REPLACED}*"):
        path = folder / old.name.removeprefix(REPLACED)
        if not path.exists():
            os.replace(old, path)
    complete = [path for path in _numbered(folder) if _damaged(path) == []]
    return max(complete, key=_step, default=None)


def check_complete(checkpoint: Path) -> None:
    """Checks that a checkpoint is complete. One without a marker, which others wrote, is not checked.

    Raises:
        CheckpointError: A file is missing or truncated.
    """
    damaged = _damaged(checkpoint)
    if damaged:
        raise CheckpointError(
            f'"{checkpoint}" is incomplete ({damaged[0]} is missing or truncated): resume from an older checkpoint'
        )


def mark_complete(folder: Path) -> None:
    """Flushes a folder and its files to the disk, and writes the marker, which lists the files and their sizes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / MARKER).write_text(json.dumps({"files": sizes}, indent=1) + "\n", encoding="utf-8")
    for path in [*files, folder / MARKER, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def _damaged(checkpoint: Path) -> list[str] | None:
    """Returns the files that are missing or have another size than in the marker; None if there is no marker."""
    try:
        sizes = dict(json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"])
        return [n for n, s in sizes.items() if not (checkpoint / n).is_file() or (checkpoint / n).stat().st_size != s]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return [MARKER]


def _replace_folder(new: Path, path: Path) -> None:
    """Renames a folder to a path. What is there is renamed first, so that a complete folder exists at any time."""
    old = path.with_name(REPLACED + path.name)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_old(newest: Path, trainer: Trainer) -> None:
    """Removes checkpoints beyond ``save_total_limit``. They are renamed first, so that none is ever incomplete.

    Args:
        newest: The checkpoint just written, which is kept even if others have higher numbers.
        trainer: The trainer, with the limit and the best checkpoint, which is kept too.
    """
    folder = newest.parent
    for gone in folder.glob(f"{REMOVED}*"):  # left by a process that was killed
        shutil.rmtree(gone)
    limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
    if not limit or limit < 0:
        return
    every = sorted(_numbered(folder), key=_step)
    kept = {newest.resolve(), *([Path(best).resolve()] if best else [])}
    surplus = len(every) - max(limit, len(kept))
    for path in [path for path in every if path.resolve() not in kept][: max(surplus, 0)]:
        gone = path.with_name(REMOVED + path.name)
        os.replace(path, gone)
        shutil.rmtree(gone)


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@contextmanager
def _output_dir(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Makes a trainer write checkpoints into another folder, inside a ``with`` block."""
    previous: Callable[..., str] | None = trainer.__dict__.get("_get_output_dir")
    trainer._get_output_dir = lambda *args, **kwargs: str(folder)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainer._get_output_dir
        if previous is not None:
            trainer._get_output_dir = previous  # type: ignore[method-assign]
