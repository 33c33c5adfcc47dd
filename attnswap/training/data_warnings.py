"""Warnings about training data: too few windows, repeated documents, held-out text in the training text."""

import random
import warnings
from collections.abc import Iterable, Sequence

from transformers import TrainingArguments

from attnswap.distributed import rank_and_world_size
from attnswap.training.data import Data
from attnswap.training.packing import IGNORED
from attnswap.training.stages import Stage

PASSAGES, CHARACTERS = 64, 100
"""Number and length of the passages of an evaluation text that are searched in the training text."""
MAX_LEAKED = 0.05
"""Share of found passages above which there is a warning. Below it they may be licences or common phrases."""
MAX_PASSES = 20
"""Number of passes over the same windows above which there is a warning."""
MIN_HELD_OUT_TOKENS = 1000
"""Number of held-out tokens below which their loss says little."""


def warn_of_data(data: Data, args: TrainingArguments, plan: list[Stage], windows_per_step: int) -> None:
    """Warns if documents are repeated, held-out text is in the training text, or there is little data for the steps.

    Args:
        data: The data of the run.
        args: The arguments of the run.
        plan: The stages of the run.
        windows_per_step: Windows that all processes together read per step.
    """
    if rank_and_world_size()[0]:
        return
    repeated, documents = data.description["repeated"], data.description["documents"]
    if repeated:
        _warn(f"{repeated} documents repeat others and are left out; {documents} are used for training")
    for index, size in enumerate(data.sizes):
        where = f' of the stage "{plan[index].section.name}"' if plan else ""
        steps = plan[index].steps if plan else args.max_steps
        passes = steps * windows_per_step / size
        if size < windows_per_step:
            _warn(f"a step reads {windows_per_step} windows, but the training text{where} fills only {size}")
        elif passes > MAX_PASSES:
            _warn(f"each of the {size} windows{where} is read {passes:.0f} times")
    labels = [label for row in data.held_out.with_format(None)["labels"] for label in row]
    held_out = sum(label != IGNORED for label in labels)
    if held_out < MIN_HELD_OUT_TOKENS and args.eval_strategy != "no":
        _warn(f"the held-out loss is a mean over only {held_out} tokens: raise data.eval_fraction")
    warn_of_leak(data.documents["document"], data.held_out_documents["document"], "the held-out documents")


def warn_of_leak(training: Iterable[str], evaluated: Sequence[str], name: str) -> None:
    """Warns if an evaluation text is in the training text, at least in part. White space is ignored.

    Args:
        training: The training documents.
        evaluated: The evaluation texts.
        name: What to call the evaluation texts in the warning.
    """
    searched = passages(evaluated)
    missing = set(searched)
    for document in training:
        text = _normalise(document)
        missing -= {passage for passage in missing if passage in text}
        if not missing:
            break
    found = sum(passage not in missing for passage in searched)
    if found > MAX_LEAKED * len(searched):
        _warn(
            f"{found} of {len(searched)} passages of {CHARACTERS} characters, drawn from {name}, are in the training "
            "text, so that results on that text will partly measure memorisation"
        )


def passages(documents: Sequence[str]) -> list[str]:
    """Draws passages from random places of some documents, the same at every call. A short document is one passage."""
    drawn, generator = [], random.Random(0)
    for _ in range(PASSAGES if documents else 0):
        text = _normalise(documents[generator.randrange(len(documents))])
        start = generator.randrange(max(1, len(text) - CHARACTERS + 1))
        drawn.append(text[start : start + CHARACTERS])
    return drawn


def _normalise(text: str) -> str:
    return " ".join(text.split())


def _warn(message: str) -> None:
    warnings.warn(f"data: {message}", stacklevel=4)
