"""Can a model find what stands far back? Passkeys, needles, associative recall and two tasks after RULER.

Every prompt is built from token ids to an exact length, from a seed. Answers are teacher-forced: the model reads the
prompt with its answer once, and what counts is the rank of each answer token among all tokens. An exact match is what
greedy decoding would have found; the ranks still tell models apart that never match.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from attnswap import text as offline
from attnswap.errors import ConfigError, non_finite
from attnswap.evaluation.scoring import Scorer

WORDS = (
    *("apple", "river", "stone", "cloud", "tiger", "piano", "garden", "window", "silver", "market"),
    *("bridge", "candle", "dragon", "engine", "forest", "guitar", "harbor", "island", "jacket", "kitten"),
    *("lemon", "mirror", "needle", "orange", "pencil", "quartz", "rocket", "saddle", "tunnel", "violin"),
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
LENGTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Prompt:
    """A prompt's pieces, as texts: what is hidden in the filler, the question, and its answer.

    Attributes:
        hidden: What stands in the filler, in order; the one asked for is ``hidden[wanted]``.
        question: What the prompt ends with.
        answer: What follows.
        wanted: Index of the hidden text that stands at the depth asked for; the others are spread evenly.
    """

    hidden: tuple[str, ...]
    question: str
    answer: str
    wanted: int = 0


Make = Callable[[random.Random], Prompt]


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10000, 99999))


def passkey(draw: random.Random) -> Prompt:
    """A number in filler that says nothing (Mohtashami and Jaggi, arXiv 2305.16300)."""
    key = _number(draw)
    return Prompt((f" The pass key is {key}. Remember it. {key} is the pass key. ",), " The pass key is", f" {key}")


def needle(draw: random.Random) -> Prompt:
    """A sentence that does not belong, in real text."""
    word, key = draw.choice(WORDS), _number(draw)
    said = f"The special magic number for {word} is"
    return Prompt((f" {said} {key}. ",), f" {said}", f" {key}")


def multikey(draw: random.Random) -> Prompt:
    """A needle among three others of its kind (after RULER, arXiv 2404.06654)."""
    words, keys = draw.sample(WORDS, 4), [_number(draw) for _ in range(4)]
    hidden = tuple(f" The special magic number for {w} is {k}. " for w, k in zip(words, keys, strict=True))
    wanted = draw.randrange(4)
    return Prompt(hidden, f" The special magic number for {words[wanted]} is", f" {keys[wanted]}", wanted)


def variables(draw: random.Random) -> Prompt:
    """A chain of assignments whose last value is asked for (after RULER's variable tracking)."""
    names = [f"{draw.choice(WORDS).upper()}_{i}" for i in range(3)]
    key = _number(draw)
    steps = [f" VAR {names[0]} = {key} ;", *(f" VAR {b} = {a} ;" for a, b in itertools.pairwise(names))]
    return Prompt(tuple(f"{step} " for step in steps), f" The value of VAR {names[-1]} is", f" {key}")


def recall(draw: random.Random) -> Prompt:
    """One of many pairs (associative recall); the filler is made of more pairs."""
    word, key = draw.choice(WORDS), _number(draw)
    return Prompt((f"\nkey {word} : {key}",), f"\nkey {word} :", f" {key}")


TASKS: dict[str, tuple[Make, str]] = {
    "passkey": (passkey, "repeated"),
    "needle": (needle, "text"),
    "recall": (recall, "pairs"),
    "multikey": (multikey, "text"),
    "variables": (variables, "text"),
}
"""Each task with the filler around it."""


@dataclass(frozen=True)
class Cell:
    """One task at one length and depth.

    Attributes:
        task: Name of the task.
        length: Tokens the model reads, answer included.
        depth: Where what is asked for stands: 0 at the beginning, 1 right before the question.
        n: Prompts.
        accuracy: Share whose every answer token was the model's favourite.
        logprob: Mean log-probability of an answer, in nats.
        rank: Mean of the geometric-mean rank of an answer's tokens (1 is best; of equals the one that greedy decoding
            takes comes first).
    """

    task: str
    length: int
    depth: float
    n: int
    accuracy: float
    logprob: float
    rank: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def measure_retrieval(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    n: int = 4,
    seed: int = 0,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Cell]:
    """Measures how well a model finds what it has read, over a grid of lengths and depths.

    Args:
        model: A causal language model, patched or not.
        tokenizer: Its tokenizer.
        tasks: Names out of :data:`TASKS`.
        lengths: Tokens the model reads.
        depths: From 0 (at the beginning) to 1 (right before the question).
        n: Prompts of each cell.
        seed: Two models measured with one seed read the same prompts.
        advance: Called with the number of tokens read.

    Raises:
        ConfigError: See :func:`check_questions`; or a learned position table is too short.
        NumericsError: The model's logits are not finite.
    """
    builder = check_questions(tokenizer, tasks, lengths, depths, n, seed)
    scorer = Scorer(model)
    scorer.check_positions(max(lengths))
    cells = []
    with scorer.ready():
        for task in tasks:
            for length in lengths:
                for depth in depths:
                    found = []
                    for index in range(n):
                        inputs, answer = builder.build(task, length, depth, index)
                        found.append(_score(scorer, inputs, answer, task))
                        advance(length)
                    matched, logprob, rank = (float(np.mean(values)) for values in zip(*found, strict=True))
                    cells.append(Cell(task, length, depth, n, matched, logprob, rank))
    return cells


def check_questions(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
    seed: int = 0,
) -> "_Builder":
    """Checks that a grid can be asked, before any model runs, and returns what builds its prompts.

    Raises:
        ConfigError: A task is unknown, a depth out of range, a length too short for a task, there is nothing to ask, or
            the tokenizer joins a question with its answer.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ConfigError(f'unknown task "{unknown[0]}". Tasks: {", ".join(TASKS)}')
    if not (tasks and lengths and depths) or not all(0 <= depth <= 1 for depth in depths) or n < 1:
        raise ConfigError(
            "retrieval needs tasks, lengths, depths between 0 and 1 and at least 1 prompt of each, not "
            f"{list(tasks)}, {list(lengths)}, {list(depths)} and {n}"
        )
    builder = _Builder(tokenizer, seed)
    for task, length in itertools.product(tasks, lengths):
        builder.build(task, length, depths[0], 0)
    return builder


def _score(scorer: Scorer, inputs: Tensor, answer: Tensor, task: str) -> tuple[float, float, float]:
    """Returns whether greedy decoding finds an answer, its log-probability, and its tokens' mean rank."""
    logits = torch.cat(list(scorer.rows(inputs[None, :-1].to(scorer.device), len(answer))), dim=1)[0].cpu()
    if not logits.isfinite().all():
        raise non_finite(f"non-finite logits in a prompt of {len(inputs)} tokens ({task})")
    own = logits.gather(1, answer[:, None])
    before = torch.arange(logits.shape[1]) < answer[:, None]  # argmax takes the first of equals
    rank = ((logits > own) | ((logits == own) & before)).sum(-1) + 1
    log_p = logits.log_softmax(-1).gather(1, answer[:, None]).sum()
    return float((rank == 1).all()), float(log_p), float(rank.double().log().mean().exp())


class _Builder:
    """Builds prompts of an exact number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self._text: list[int] | None = None

    def build(self, task: str, length: int, depth: float, index: int) -> tuple[Tensor, Tensor]:
        """Returns the tokens a model reads, and the answer they end with."""
        draw = random.Random(f"{self.seed} {task} {length} {depth} {index}")
        make, kind = TASKS[task]
        prompt = make(draw)
        hidden, question = [self._encode(part) for part in prompt.hidden], self._encode(prompt.question)
        both = self._encode(prompt.question + prompt.answer)  # together, or some tokenizers begin a text anew
        answer = both[len(question) :]
        if both[: len(question)] != question or not answer:
            raise ConfigError(f"the tokenizer joins question and answer of the task {task}: leave it out of the tasks")
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        room = length - len(bos) - sum(map(len, hidden)) - len(question) - len(answer)
        if room < 0:
            raise ConfigError(f"{length} tokens are too few for the task {task}, which needs {length - room} at least")
        filler = self._filler(kind, room, draw, prompt)
        places = [round(room * depth) if i == prompt.wanted else 0 for i in range(len(hidden))]
        if task == "variables":  # a chain is read in order: the first stands at the depth, the rest follow
            rest = room - places[0]
            places = [places[0] + round(rest * i / len(hidden)) for i in range(len(hidden))]
        else:
            others = [i for i in range(len(hidden)) if i != prompt.wanted]
            for rank, i in enumerate(others):
                places[i] = round(room * (rank + 0.5) / len(others))
        ids, done = list(bos), 0
        for place, i in sorted((place, i) for i, place in enumerate(places)):
            ids += filler[done:place] + hidden[i]
            done = place
        ids += filler[done:] + question + answer
        return torch.tensor(ids), torch.tensor(answer)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _filler(self, kind: str, room: int, draw: random.Random, prompt: Prompt) -> list[int]:
        if kind == "text":
            if self._text is None:
                self._text = self.tokenizer(offline.evaluation_text(), add_special_tokens=False, verbose=False)[
                    "input_ids"
                ]
            start = draw.randrange(max(1, len(self._text) - room))
            return (self._text * (room // len(self._text) + 1))[start : start + room]
        pieces: Iterator[str] = iter(lambda: FILLER, None)
        if kind == "pairs":
            free = [word for word in WORDS if f" {word} :" not in prompt.question]
            pieces = (f"\nkey {draw.choice(free)}{draw.randrange(100)} : {_number(draw)}" for _ in iter(int, 1))
        ids: list[int] = []
        while len(ids) < room:
            ids += self._encode(next(pieces))
        return ids[:room]
