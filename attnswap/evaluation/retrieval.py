"""Retrieval from long contexts: passkeys, needles, associative recall and two tasks after RULER.

Prompts are built from token ids to an exact length, by a seed. Answers are teacher-forced: the model reads prompt and
answer in one forward pass, and the metric is the rank of each answer token among all tokens of the vocabulary. If every
rank is 1, greedy decoding would have given the answer. The ranks also distinguish models that never give it.
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
    """The parts of a prompt, as texts.

    Attributes:
        hidden: Texts that are inserted into the filler, in order.
        question: The end of the prompt.
        answer: The continuation that is scored.
        wanted: Index of the hidden text that contains the answer. It is inserted at the depth that is measured; the
            others are spread evenly.
    """

    hidden: tuple[str, ...]
    question: str
    answer: str
    wanted: int = 0


Make = Callable[[random.Random], Prompt]


def _number(draw: random.Random) -> str:
    return str(draw.randrange(10000, 99999))


def passkey(draw: random.Random) -> Prompt:
    """A number in repeated filler sentences (Mohtashami and Jaggi, arXiv 2305.16300)."""
    key = _number(draw)
    return Prompt((f" The pass key is {key}. Remember it. {key} is the pass key. ",), " The pass key is", f" {key}")


def needle(draw: random.Random) -> Prompt:
    """An unrelated sentence in real text."""
    word, key = draw.choice(WORDS), _number(draw)
    said = f"The special magic number for {word} is"
    return Prompt((f" {said} {key}. ",), f" {said}", f" {key}")


def multikey(draw: random.Random) -> Prompt:
    """Four needles, one of which is asked for (after RULER, arXiv 2404.06654)."""
    words, keys = draw.sample(WORDS, 4), [_number(draw) for _ in range(4)]
    hidden = tuple(f" The special magic number for {w} is {k}. " for w, k in zip(words, keys, strict=True))
    wanted = draw.randrange(4)
    return Prompt(hidden, f" The special magic number for {words[wanted]} is", f" {keys[wanted]}", wanted)


def variables(draw: random.Random) -> Prompt:
    """A chain of assignments, whose last variable is asked for (after RULER's variable tracking)."""
    names = [f"{draw.choice(WORDS).upper()}_{i}" for i in range(3)]
    key = _number(draw)
    steps = [f" VAR {names[0]} = {key} ;", *(f" VAR {b} = {a} ;" for a, b in itertools.pairwise(names))]
    return Prompt(tuple(f"{step} " for step in steps), f" The value of VAR {names[-1]} is", f" {key}")


def recall(draw: random.Random) -> Prompt:
    """One key-value pair among many (associative recall): the filler consists of other pairs."""
    word, key = draw.choice(WORDS), _number(draw)
    return Prompt((f"\nkey {word} : {key}",), f"\nkey {word} :", f" {key}")


TASKS: dict[str, tuple[Make, str]] = {
    "passkey": (passkey, "repeated"),
    "needle": (needle, "text"),
    "recall": (recall, "pairs"),
    "multikey": (multikey, "text"),
    "variables": (variables, "text"),
}
"""The function that draws a prompt, and the kind of filler, by name of the task."""


@dataclass(frozen=True)
class Cell:
    """One task at one length and depth.

    Attributes:
        task: Name of the task.
        length: Tokens that the model reads, answer included.
        depth: Position of the hidden text: 0 at the beginning, 1 right before the question.
        n: Number of prompts.
        accuracy: Share of the prompts of which every answer token was the model's most likely one.
        logprob: Mean log-probability of an answer, in nats.
        rank: Geometric mean of the ranks of an answer's tokens, averaged over prompts; 1 is best. Of tokens with equal
            logits the one that greedy decoding takes comes first.
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
    """Measures retrieval over a grid of tasks, lengths and depths.

    Args:
        model: A causal language model, patched or not.
        tokenizer: The model's tokenizer.
        tasks: Names of :data:`TASKS`.
        lengths: Tokens that the model reads.
        depths: From 0 (at the beginning) to 1 (right before the question).
        n: Prompts per cell.
        seed: Determines the prompts, so that models measured with one seed read the same ones.
        advance: Called after each prompt with the number of tokens read.

    Raises:
        ConfigError: See :func:`check_prompts`, or a learned position embedding has too few positions.
        NumericsError: The model's logits are not finite.
    """
    builder = check_prompts(tokenizer, tasks, lengths, depths, n, seed)
    scorer = Scorer(model)
    scorer.check_positions(max(lengths))
    cells = []
    with scorer.eval_no_grad():
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


def check_prompts(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
    seed: int = 0,
) -> "_Builder":
    """Checks, before any model runs, that the prompts of a grid can be built, and returns their builder.

    Raises:
        ConfigError: A task is unknown, a depth is out of range, the grid is empty, a length is too short for a task, or
            the tokenizer merges the end of a question with the beginning of its answer.
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
    """Returns whether greedy decoding gives the answer (1 or 0), its log-probability, and its tokens' mean rank."""
    logits = torch.cat(list(scorer.logit_chunks(inputs[None, :-1].to(scorer.device), len(answer))), dim=1)[0].cpu()
    if not logits.isfinite().all():
        raise non_finite(f"the logits of a prompt of {len(inputs)} tokens ({task}) are not finite")
    own = logits.gather(1, answer[:, None])
    earlier = torch.arange(logits.shape[1]) < answer[:, None]  # of equal logits, argmax takes the first
    rank = ((logits > own) | ((logits == own) & earlier)).sum(-1) + 1
    log_p = logits.log_softmax(-1).gather(1, answer[:, None]).sum()
    return float((rank == 1).all()), float(log_p), float(rank.double().log().mean().exp())


class _Builder:
    """Builds prompts of an exact number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.tokenizer, self.seed = tokenizer, seed
        self._text: list[int] | None = None

    def build(self, task: str, length: int, depth: float, index: int) -> tuple[Tensor, Tensor]:
        """Returns the token ids of prompt and answer, and those of the answer alone."""
        draw = random.Random(f"{self.seed} {task} {length} {depth} {index}")
        make, kind = TASKS[task]
        prompt = make(draw)
        hidden, question = [self._encode(part) for part in prompt.hidden], self._encode(prompt.question)
        both = self._encode(prompt.question + prompt.answer)  # together: some tokenizers mark the start of a text
        answer = both[len(question) :]
        if both[: len(question)] != question or not answer:
            raise ConfigError(f"the tokenizer merges question and answer of the task {task}: leave this task out")
        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        room = length - len(bos) - sum(map(len, hidden)) - len(question) - len(answer)
        if room < 0:
            raise ConfigError(f"{length} tokens are too few for the task {task}, which needs at least {length - room}")
        filler = self._filler(kind, room, draw, prompt)
        places = [round(room * depth) if i == prompt.wanted else 0 for i in range(len(hidden))]
        if task == "variables":  # in the order of the chain: the first at the depth, the others after it
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
