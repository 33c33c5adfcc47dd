"""Warnings of data that a run learns or shows little with: too few windows, repeated documents, leaked passages."""

import random
import warnings
from collections.abc import Iterable, Sequence

from transformers import TrainingArguments

from attnswap.distributed import rank_and_world_size
from attnswap.training.data import Data
from attnswap.training.packing import IGNORED
from attnswap.training.stages import Stage

PASSAGES, CHARACTERS = 64, 100
"""How many passages of an evaluation text are looked for in the training text, and how long they are."""
LEAKED = 0.05
"""Share of such passages that is worth a warning: a licence or a figure of speech may be in both."""
PASSES = 20
"""Passes over the same windows that are worth a warning."""
SHOWN = 1000
"""Held-out tokens below which their loss says little."""


def warn_of_scarcity(data: Data, args: TrainingArguments, plan: list[Stage], step: int) -> None:
    """Warns of a run whose data is repeated, leaks into what is evaluated, or is little for its steps.

    Args:
        data: What is trained and evaluated on.
        args: The run's.
        plan: Its stages.
        step: Windows that all processes read in a step.
    """
    if rank_and_world_size()[0]:
        return
    repeated, documents = data.description["repeated"], data.description["documents"]
    if repeated:
        _warn(f"{repeated} documents repeat others and are left out; {documents} are trained on")
    for index, size in enumerate(data.sizes):
        where = f' of the stage "{plan[index].section.name}"' if plan else ""
        steps = plan[index].steps if plan else args.max_steps
        if size < step:
            _warn(
                f"a step reads {step} windows, and all the training text{where} fills {size}: it repeats within a step"
            )
        elif steps * step > PASSES * size:
            _warn(f"the {size} windows{where} are each read {steps * step / size:.0f} times")
    labels = [label for row in data.held_out.with_format(None)["labels"] for label in row]
    shown = sum(label != IGNORED for label in labels)
    if shown < SHOWN and args.eval_strategy != "no":
        _warn(f"only {shown} held-out tokens are evaluated, whose loss says little: raise data.eval_fraction")
    warn_of_leak(data.documents["document"], data.held_out_documents["document"], "the held-out documents")


def warn_of_leak(training: Iterable[str], evaluated: Sequence[str], name: str) -> None:
    """Warns if a text to evaluate on is in the training text, in part or whole, whatever its white space."""
    wanted = passages(evaluated)
    left = set(wanted)
    for document in training:
        text = _plain(document)
        left -= {passage for passage in left if passage in text}
        if not left:
            break
    found = sum(passage not in left for passage in wanted)
    if found > LEAKED * len(wanted):
        _warn(
            f"{found} of {len(wanted)} passages of {CHARACTERS} characters, drawn from {name}, are in the training "
            "text: what is measured on them is partly memory"
        )


def passages(documents: Sequence[str]) -> list[str]:
    """Draws passages from all over some documents, the same at every call; short documents are passages as a whole."""
    drawn, generator = [], random.Random(0)
    for _ in range(PASSAGES if documents else 0):
        text = _plain(documents[generator.randrange(len(documents))])
        start = generator.randrange(max(1, len(text) - CHARACTERS + 1))
        drawn.append(text[start : start + CHARACTERS])
    return drawn


def _plain(text: str) -> str:
    return " ".join(text.split())


def _warn(message: str) -> None:
    warnings.warn(f"data: {message}", stacklevel=4)
