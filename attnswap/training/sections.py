"""The sections of a recipe about stages: losses, calibration, the ramp of lambda, and what is trained."""

from dataclasses import dataclass, field
from typing import Literal

from attnswap.errors import require


@dataclass(frozen=True)
class LossSection:
    """The loss of a stage: a weighted sum of the following parts, per token.

    Attributes:
        ce: Weight of the cross entropy with the labels.
        kl: Weight of the divergence KL(teacher || student) of the next-token distributions.
        temperature: Divides the logits of both models in the divergence, which is multiplied by its square.
        transfer: Weight of the distance between the attention outputs of student and teacher, each student layer
            having the teacher's input: the mean over layers of ``|o - o_teacher|^2 / |o_teacher|^2``. It cannot be
            combined with ce and kl.
        regression: Weight of the squared errors of predictions that swaps make from the hidden states (a sigmoid with
            ``bias: predicted`` predicts the logsumexp of a row), a mean over layers and heads. It can be trained at a
            lambda of 0. A stage with this loss alone and ``train: swap`` calibrates the predictions.
        sinks: Weight of the attention to the first token of a text above 0.2, a mean over layers and heads. It removes
            the sinks of a pretrained model from heads whose swap does not need them.
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
            "loss.transfer: cannot be combined with ce or kl, since layers with the teacher's inputs give no logits: "
            "set ce and kl to 0 in this stage, and use them in another one",
        )

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss compares the model with a teacher."""
        return self.kl > 0 or self.transfer > 0

    @property
    def uses_logits(self) -> bool:
        """Whether the loss depends on the model's logits."""
        return self.ce > 0 or self.kl > 0

    @property
    def observes_layers(self) -> bool:
        """Whether the loss reads the inside of layers, so that each must run once and unsharded."""
        return self.transfer > 0 or self.regression > 0 or self.sinks > 0


@dataclass(frozen=True)
class FitSection:
    """Least-squares calibration before the first step; see :func:`attnswap.training.fit`.

    Attributes:
        tokens: Number of tokens of the training text to fit to. The inputs of all layers are kept in main memory
            meanwhile: 2 bytes per token, layer and entry of the hidden state.
        sequence_lengths: Lengths of the windows, with as many tokens of each. Windows of another length than
            ``data.sequence_length`` are filled by one document each. None: only ``data.sequence_length``; the fit then
            knows nothing about rows with more keys.
    """

    tokens: int = 65536
    sequence_lengths: list[int] | None = None

    def __post_init__(self) -> None:
        require(self.tokens > 0, "fit.tokens: must be positive")
        lengths = self.sequence_lengths
        require(lengths is None or (bool(lengths) and min(lengths) > 0), "fit.sequence_lengths: must be positive")


@dataclass(frozen=True)
class RampSection:
    """The schedule of lambda in a stage.

    Attributes:
        start: lambda before the first step.
        end: lambda after the ramp.
        over: Length of the ramp as a share of the stage's steps; then every head is at ``end``.
        shape: ``"geometric"`` multiplies lambda by the same factor in each step, from ``least`` if ``start`` is 0. Many
            swaps change a row of n keys in proportion to n times lambda, so that equal steps would begin with a jump.
            ``"linear"`` adds the same amount in each step. ``"cosine"`` starts and ends slowly.
        least: First value of a geometric ramp from 0.
        layers: Whether layers move together, or one after another and from which end.
        heads: Whether the heads of a layer move together or one after another.
        spread: If layers or heads move one after another: the share of the ramp over which their starts are spread.
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
        require(self.shape != "geometric" or self.end > 0, "ramp.shape: a geometric ramp cannot end at 0: use linear")
        require(0 < self.over <= 1, "ramp.over: must be above 0 and at most 1")
        require(0 < self.least < 1, "ramp.least: must lie between 0 and 1")
        require(0 <= self.spread < 1, "ramp.spread: must be at least 0 and below 1")


@dataclass(frozen=True)
class StageSection:
    """One stage of a training run.

    Attributes:
        name: Name of the stage in logs.
        share: Share of the run's steps (``training.max_steps``).
        loss: See :class:`LossSection`.
        ramp: See :class:`RampSection`; None: lambda does not change.
        train: Which parameters are trained: ``"all"``, those of the attention modules (``"attention"``), or those of
            the swap (``"swap"``).
        sequence_length: Tokens per window, for a stage on long documents: each window is filled by one document. None:
            packed windows of ``data.sequence_length``.
        learning_rate: Peak learning rate; None: ``training.learning_rate``. Each stage has its own warmup and decay.
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
            f'stages: "{self.name}" has the loss transfer, which trains attention modules only: set '
            "train: attention or train: swap",
        )
