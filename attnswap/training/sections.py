"""The stages of a recipe: what is learned, how lambda moves, and what is trained, one after the other."""

from dataclasses import dataclass, field
from typing import Literal

from attnswap.errors import require


@dataclass(frozen=True)
class LossSection:
    """What a stage of training minimises, per token.

    Attributes:
        ce: Weight of the cross entropy with the text.
        kl: Weight of the divergence KL(teacher || student) of the next-token distributions.
        temperature: Divides both models' logits in the divergence, whose gradient is scaled back by it.
        transfer: Weight of the attention outputs' distance to the teacher's, each layer having seen the teacher's
            input: the mean over layers of ``|o - o_teacher|^2 / |o_teacher|^2``. It stands alone, without ce and kl.
        regression: Weight of the squared errors of what swaps predict (the row's logsumexp, of a sigmoid with
            ``bias: predicted``), a mean over layers and heads, at a lambda of 0 too. Alone, with ``train: swap``, it
            calibrates them.
        sinks: Weight of the attention to a text's first token beyond a fifth, a mean over layers and heads: it takes
            heads off the sink that a pretrained model gave them, where its swap can do without.
    """

    ce: float = 1.0
    kl: float = 0.0
    temperature: float = 1.0
    transfer: float = 0.0
    regression: float = 0.0
    sinks: float = 0.0

    def __post_init__(self) -> None:
        weights = (self.ce, self.kl, self.transfer, self.regression, self.sinks)
        require(min(weights) >= 0, "loss: a weight must not be negative")
        require(
            self.ce + self.kl + self.transfer + self.regression > 0,
            "loss: one of ce, kl, transfer and regression must be positive",
        )
        require(self.temperature > 0, "loss.temperature: must be positive")
        require(
            not self.transfer or not (self.ce or self.kl),
            "loss.transfer: stands alone (its layers see the teacher's inputs, so there are no logits to compare): set "
            "ce and kl to 0, and give them a stage of their own",
        )

    @property
    def taught(self) -> bool:
        """Whether a teacher takes part."""
        return self.kl > 0 or self.transfer > 0

    @property
    def of_logits(self) -> bool:
        """Whether the model's logits are learned, not its layers alone."""
        return self.ce > 0 or self.kl > 0

    @property
    def looks_inside(self) -> bool:
        """Whether layers are looked into as they run, so that each must run once and keep what it computed."""
        return self.transfer > 0 or self.regression > 0 or self.sinks > 0


@dataclass(frozen=True)
class FitSection:
    """Calibration before the first step; see :func:`attnswap.training.fit`.

    Attributes:
        tokens: Tokens of the training text to look at. What enters each layer is kept in main memory meanwhile: 2 bytes
            for each token, layer and entry of its hidden state.
        sequence_lengths: Tokens of the windows to look at, as many of each kind; where one is not
            ``data.sequence_length``, its windows are filled by one document each. None: ``data.sequence_length`` alone,
            from which nothing is known of what changes with more keys.
    """

    tokens: int = 65536
    sequence_lengths: list[int] | None = None

    def __post_init__(self) -> None:
        require(self.tokens > 0, "fit.tokens: must be positive")
        lengths = self.sequence_lengths
        require(lengths is None or (bool(lengths) and min(lengths) > 0), "fit.sequence_lengths: must be positive")


@dataclass(frozen=True)
class RampSection:
    """How lambda moves over a stage.

    Attributes:
        start: lambda of the first step.
        end: lambda once the ramp is over.
        over: Share of the stage's steps until every head is at ``end``.
        shape: ``"geometric"`` multiplies lambda by the same factor each step, from ``least`` where ``start`` is 0:
            what a swap adds to a row of n keys grows like n times lambda, so equal steps of lambda begin with a
            jump. ``"linear"`` adds the same, ``"cosine"`` starts and ends slowly.
        least: Where a geometric ramp from 0 begins.
        layers: Which layers move first; the others follow one after another.
        heads: Whether the heads of a layer move together or one after another.
        spread: Share of the ramp over which those that follow begin; 0: all at once.
    """

    start: float = 0.0
    end: float = 1.0
    over: float = 0.6
    shape: Literal["geometric", "linear", "cosine"] = "geometric"
    least: float = 1e-3
    layers: Literal["together", "first to last", "last to first"] = "together"
    heads: Literal["together", "one by one"] = "together"
    spread: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.start <= 1 and 0 <= self.end <= 1, "ramp: start and end must lie between 0 and 1")
        require(self.shape != "geometric" or self.end > 0, "ramp.shape: a geometric ramp never gets to 0: take linear")
        require(0 < self.over <= 1, "ramp.over: must be above 0 and at most 1")
        require(0 < self.least < 1, "ramp.least: must lie between 0 and 1")
        require(0 <= self.spread < 1, "ramp.spread: must be at least 0 and below 1")


@dataclass(frozen=True)
class StageSection:
    """One stage of a training run.

    Attributes:
        name: What the log calls it.
        share: Its share of the run's steps (``training.max_steps``).
        loss: See :class:`LossSection`.
        ramp: See :class:`RampSection`; None: lambda stays where it is.
        train: ``"attention"`` trains the attention modules alone, ``"swap"`` the swap's own parameters.
        sequence_length: Tokens in a window that one document fills from end to end, for a stage on long documents;
            None: packed windows of ``data.sequence_length``.
        learning_rate: Its highest learning rate; None: ``training.learning_rate``. Each stage warms up and decays for
            itself.
    """

    name: str
    share: float
    loss: LossSection = field(default_factory=LossSection)
    ramp: RampSection | None = None
    train: Literal["all", "attention", "swap"] = "all"
    sequence_length: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        require(self.name.strip() != "", "stages: a stage needs a name")
        require(0 < self.share <= 1, f'stages: the share of "{self.name}" must be above 0 and at most 1')
        require(self.learning_rate is None or self.learning_rate >= 0, "stages: a learning rate must not be negative")
        length = self.sequence_length
        require(length is None or 2 <= length <= 1 << 24, f'stages: sequence_length of "{self.name}" is out of range')
        require(
            not self.loss.transfer or self.train != "all",
            f'stages: "{self.name}" transfers attention outputs, which trains the attention or the swap: set '
            "train: attention",
        )
