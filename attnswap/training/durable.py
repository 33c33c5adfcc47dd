"""Checkpoints that are either whole or not there.

A checkpoint is written into a hidden folder, forced to the disk, marked as complete, and only then renamed to the name
under which it is looked for; older ones are removed after that. So whenever a process is killed, the latest
checkpoint is the last one that was finished.
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
from attnswap.training.ramp import follow_checkpoint, note_ramps

MARKER = "complete.json"
WRITING, REPLACED, REMOVED = ".writing", ".replaced-", ".removed-"


class DurableCheckpoints(TrainerCallback):
    """Makes a trainer write whole checkpoints or none, and reload them with the lambda they were saved at.

    ``trainer.add_callback(DurableCheckpoints(trainer))``; works with ``transformers.Trainer`` and its subclasses, in
    one process or several.

    Args:
        trainer: Changed in place: this instance alone saves and loads differently.

    Raises:
        CheckpointError: The trainer has no ``_save_checkpoint`` to wrap.
    """

    def __init__(self, trainer: Trainer) -> None:
        for name in ("_save_checkpoint", "_load_from_checkpoint", "_load_best_model", "_get_output_dir"):
            if not callable(getattr(trainer, name, None)):
                raise CheckpointError(
                    f"{type(trainer).__name__} has no {name}: this version of transformers is unknown"
                )
        self.trainer = trainer
        self._over = False
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
        """Notes a step too many: resumed at its last step in mid-epoch, Trainer would take another one."""
        self._over = 0 < state.max_steps <= state.global_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the optimizer nothing to do in such a step."""
        if self._over:
            kwargs["optimizer"].zero_grad(set_to_none=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Does not count it."""
        if self._over:
            state.global_step = state.max_steps

    def save(self, model: Any, trial: Any = None) -> None:
        """Saves as the trainer would, but aside, and puts the result in its place once it is on the disk."""
        trainer = self.trainer
        folder = Path(trainer._get_output_dir(trial=trial))
        aside = folder / WRITING
        name = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        writes = trainer.args.should_save
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        barrier()
        with _elsewhere(trainer, aside):
            self._save(model, trial)
        barrier()
        best = trainer.state.best_model_checkpoint
        # Trainer looks for the folder of the best step, too early where the weights are sharded, and in each process
        # for itself.
        if trainer.state.best_global_step == trainer.state.global_step:
            trainer.state.best_model_checkpoint = str(folder / name)
        if writes:
            if best != trainer.state.best_model_checkpoint:
                trainer.state.save_to_json(str(aside / name / TRAINER_STATE_NAME))
            note_ramps(trainer.model, aside / name)
            seal(aside / name)
            _put(aside / name, folder / name)
            shutil.rmtree(aside)
            _rotate(folder / name, trainer)
        barrier()

    def load(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads a checkpoint after a look whether it is whole, at the lambda it was saved at.

        Raises:
            CheckpointError: A file is missing or cut short.
        """
        check(Path(resume_from_checkpoint))
        follow_checkpoint(self.trainer.model, Path(resume_from_checkpoint))
        self._load(resume_from_checkpoint, model)

    def load_best(self) -> None:
        """Loads the best checkpoint at the end, at the lambda it was saved at."""
        if self.trainer.state.best_model_checkpoint is not None:
            follow_checkpoint(self.trainer.model, Path(self.trainer.state.best_model_checkpoint))
        self._best()


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, or None.

    Args:
        folder: The trainer's ``output_dir``. A checkpoint whose replacement was interrupted is put back.
    """
    folder = Path(folder)
    for old in folder.glob(f"{REPLACED}*"):
        place = folder / old.name.removeprefix(REPLACED)
        if not place.exists():
            os.replace(old, place)
    whole = [path for path in _numbered(folder) if _missing(path) == []]
    return max(whole, key=_step, default=None)


def check(checkpoint: Path) -> None:
    """Checks that a checkpoint is whole; one without a marker was written by others and is taken as it is.

    Raises:
        CheckpointError: A file is missing or cut short.
    """
    missing = _missing(checkpoint)
    if missing:
        raise CheckpointError(
            f'"{checkpoint}" is incomplete ({missing[0]} is missing or cut short): resume from an older checkpoint'
        )


def seal(folder: Path) -> None:
    """Forces everything in a folder to the disk and lists it in a marker."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    (folder / MARKER).write_text(json.dumps({"files": sizes}, indent=1) + "\n", encoding="utf-8")
    for path in [*files, folder / MARKER, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        sync(path)


def _missing(checkpoint: Path) -> list[str] | None:
    """Returns the files that are not as the marker says; None without a marker."""
    try:
        sizes = dict(json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"])
        return [n for n, s in sizes.items() if not (checkpoint / n).is_file() or (checkpoint / n).stat().st_size != s]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return [MARKER]


def _put(new: Path, place: Path) -> None:
    old = place.with_name(REPLACED + place.name)
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(new, place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _rotate(newest: Path, trainer: Trainer) -> None:
    """Removes checkpoints beyond ``save_total_limit``, under another name first: none is ever half there.

    Args:
        newest: The one just written, which stays whatever its number.
        trainer: Knows the limit and the best one, which stays too.
    """
    folder = newest.parent
    for gone in folder.glob(f"{REMOVED}*"):  # of a process that was killed
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
def _elsewhere(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Makes a trainer write its next checkpoint into another folder."""
    before: Callable[..., str] | None = trainer.__dict__.get("_get_output_dir")
    trainer._get_output_dir = lambda *args, **kwargs: str(folder)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del trainer._get_output_dir
        if before is not None:
            trainer._get_output_dir = before  # type: ignore[method-assign]
