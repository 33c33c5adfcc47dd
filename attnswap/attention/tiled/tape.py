"""Expression trees as a list of tensor operations that write into a few reused buffers.

A tile of scores is as large as a cache: what costs time is how often it is read and written, and memory that is asked
for anew each time. So shared parts are computed once, and a buffer is written again as soon as nobody reads it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from attnswap.swaps.expression import VOCABULARY, Expr, constant

OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "gt": torch.gt,
    "relu": lambda x, out: torch.clamp(x, min=0, out=out),
    "softplus": lambda x, out: torch.logaddexp(x, x.new_zeros(()), out=out),
    **{name: word.torch for name, word in VOCABULARY.items() if name not in ("relu", "softplus")},
}
"""How each word is computed into a given tensor."""


@dataclass(frozen=True)
class Step:
    """One operation: of values by number, into a buffer, or where the value is no tile into memory of its own."""

    op: str
    args: tuple[int, ...]
    value: int
    buffer: int | None


class Tape:
    """Some trees over ``s``, a tile of scores, and symbols that broadcast to it.

    Attributes:
        buffers: How many tiles of memory it writes, that of the scores among them (number 0).
        zeros: Names of the trees that are 0 whatever the score.
    """

    def __init__(self, trees: Mapping[str, Expr]) -> None:
        self.values: list[Expr] = []
        self._numbers: dict[Expr, int] = {}
        self.results = {name: self._number(tree) for name, tree in trees.items()}
        self.zeros = {name for name, tree in trees.items() if tree == constant(0)}
        self._wide = [False] * len(self.values)
        self.steps = self._schedule()
        self._known: dict[tuple[torch.dtype, torch.device], dict[int, Tensor]] = {}

    def _number(self, tree: Expr) -> int:
        if tree not in self._numbers:
            if tree.op not in ("symbol", "constant"):
                for argument in tree.args:
                    self._number(argument)
            self._numbers[tree] = len(self.values)
            self.values.append(tree)
        return self._numbers[tree]

    def _schedule(self) -> list[Step]:
        args = [() if v.op in ("symbol", "constant") else tuple(self._numbers[a] for a in v.args) for v in self.values]
        last = {a: place for place, arguments in enumerate(args) for a in arguments}
        last |= dict.fromkeys(self.results.values(), len(self.values))
        held: dict[int, int] = {}
        free: list[int] = []
        self.buffers, steps = 1, []
        for place, value in enumerate(self.values):
            if value.op == "symbol":
                self._wide[place] = value.args[0] == "s"
                if self._wide[place]:
                    held[place] = 0
            if not args[place]:
                continue
            self._wide[place] = any(self._wide[a] for a in args[place])
            buffer = None
            if self._wide[place]:
                # An operation may overwrite what it reads, element by element, if that is read for the last time.
                free += [held.pop(a) for a in set(args[place]) & held.keys() if last[a] == place]
                if value.op != "gt":  # truth values are bytes, and rare
                    if not free:
                        free.append(self.buffers)
                        self.buffers += 1
                    buffer = held[place] = free.pop()
            steps.append(Step(value.op, args[place], place, buffer))
        return steps

    def run(self, symbols: Mapping[str, Tensor], memory: list[Tensor]) -> dict[str, Tensor]:
        """Computes the trees.

        Args:
            symbols: A value for each symbol; ``s`` lies in ``memory[0]`` and may be overwritten.
            memory: Flat buffers, at least :attr:`buffers` of them, each of a tile's size.

        Returns:
            The results by name; those that are tiles lie in ``memory``.
        """
        s = symbols["s"]
        shape, size = s.shape, prod(s.shape)
        if (s.dtype, s.device) not in self._known:
            numbers = {place: v.args[0] for place, v in enumerate(self.values) if v.op == "constant"}
            self._known[s.dtype, s.device] = {place: s.new_tensor(x) for place, x in numbers.items()}
        found: dict[int, Any] = dict(self._known[s.dtype, s.device])
        found |= {place: symbols[v.args[0]] for place, v in enumerate(self.values) if v.op == "symbol"}
        for step in self.steps:
            out = None if step.buffer is None else memory[step.buffer][:size].view(shape)
            found[step.value] = OPERATIONS[step.op](*(found[a] for a in step.args), out=out)
        return {name: found[place] for name, place in self.results.items()}
