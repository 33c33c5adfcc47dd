"""The recipe: everything a training run depends on, as strict dataclasses read from YAML."""

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments

from attnswap import swaps
from attnswap.errors import ConfigError, require
from attnswap.hints import coerce, from_mapping, join, show, unknown_key
from attnswap.loading import EMBEDDED
from attnswap.training.sections import FitSection, StageSection
from attnswap.training.strict import parse_value, read_yaml

RESERVED = {
    "output_dir": "set output_dir at the top of the recipe",
    "do_train": "a run always trains",
    "do_eval": "set training.eval_strategy",
    "do_predict": "a run does not predict",
    "remove_unused_columns": "the data holds just what the model takes",
    "label_names": "labels are always called labels",
    "use_cache": "a cache would let packed documents see each other",
    "label_smoothing_factor": "the loss is plain cross entropy",
    "use_liger_kernel": "the chunked loss has its place",
    "liger_kernel_config": "the chunked loss has its place",
    "prediction_loss_only": "evaluation always sums the loss token by token",
    "parallelism_config": "it cannot be written in YAML",
    "auto_find_batch_size": "a smaller batch would be another experiment",
}
"""Fields of TrainingArguments that a recipe may not set, and why."""

COUNTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}
"""Fields of TrainingArguments and their least values, which Trainer itself meets in the middle of a run."""


def _resolve(swap: str | dict[str, Any]) -> None:
    try:
        swaps.resolve(swap)
    except TypeError as error:  # an option of a type its check cannot compare
        raise ConfigError(f"swap: an option has the wrong type: {error}") from None


@dataclass(frozen=True)
class ModelSection:
    """Which model to start from.

    Attributes:
        reference: A hub name, a directory, a ``.gguf`` file or ``"embedded"``.
        tokenizer: Where its tokenizer is; None: the same place.
        dtype: Dtype of the weights while training. Use ``training.bf16`` for mixed precision.
    """

    reference: str = EMBEDDED
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class DataSection:
    """What to train and evaluate on.

    Attributes:
        source: ``"offline"`` (the standard library's sources), ``"files"`` or ``"hub"``.
        kind: ``"text"``: every token is learned; ``"chat"``: only the assistant's (files are then JSON lines with
            ``messages``).
        files: Paths or globs, also with ``.gz``, for ``source: files``. Each line of a ``.jsonl`` file holds a document
            under the key ``text``; other files hold the text itself.
        documents: A text document is a whole ``"file"`` (of JSON lines: a line) or a ``"paragraph"`` between blank
            lines.
        name: Hub data set, for ``source: hub``.
        config: Its configuration.
        split: Its split; slices such as ``train[:1000]`` work.
        column: Its column, or the key of JSON lines; None: ``text``, or ``messages`` for chat.
        sequence_length: Tokens in a window.
        pack: Put several documents into a window, kept apart by position ids; false: one for each window.
        eval_fraction: Share of the documents held out for evaluation, at least one document.
        eval_windows: Evaluate on at most so many windows; None: all.
        max_documents: Use so many documents, drawn by ``seed``; None: all.
        seed: Draws the held-out documents.
        cache_dir: Where prepared data is kept; None: the usual cache of ``datasets``.
    """

    source: Literal["offline", "files", "hub"] = "offline"
    kind: Literal["text", "chat"] = "text"
    files: list[str] = field(default_factory=list)
    documents: Literal["file", "paragraph"] = "file"
    name: str | None = None
    config: str | None = None
    split: str = "train"
    column: str | None = None
    sequence_length: int = 1024
    pack: bool = True
    eval_fraction: float = 0.05
    eval_windows: int | None = None
    max_documents: int | None = None
    seed: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        require(2 <= self.sequence_length <= 1 << 24, "data.sequence_length: must be at least 2 and at most 16777216")
        require(0 < self.eval_fraction < 1, "data.eval_fraction: must lie between 0 and 1")
        require(self.eval_windows is None or self.eval_windows > 0, "data.eval_windows: must be positive")
        require(self.max_documents is None or self.max_documents > 1, "data.max_documents: must be at least 2")
        require(0 <= self.seed < 1 << 63, "data.seed: must be at least 0 and below 2^63")
        require((self.source == "files") == bool(self.files), 'data.files: goes with "source: files", and only with it')
        require(
            (self.source == "hub") == (self.name is not None), 'data.name: goes with "source: hub", and only with it'
        )
        require(self.kind == "text" or self.source != "offline", "data.kind: the offline text holds no chats")


@dataclass(frozen=True)
class LoraSection:
    """Train low-rank adapters in place of the model's own weights; they are merged into the result.

    Attributes:
        r: Rank.
        alpha: Scale of the update times ``r``.
        dropout: Dropout before the adapters.
        target_modules: Module names, or ``"all-linear"``.
    """

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        require(self.r > 0, "lora.r: must be positive")
        require(self.alpha > 0, "lora.alpha: must be positive")
        require(0 <= self.dropout < 1, "lora.dropout: must be at least 0 and below 1")


@dataclass(frozen=True)
class OptimizerSection:
    """How the swap's parameters are trained beside the model's.

    Attributes:
        swap_lr_multiplier: Learning rate of the swap's parameters over that of the rest; they have no weight decay.
        freeze: ``"all_but_swap"`` trains the swap's parameters alone.
    """

    swap_lr_multiplier: float = 10.0
    freeze: Literal["none", "all_but_swap"] = "none"

    def __post_init__(self) -> None:
        require(self.swap_lr_multiplier > 0, "optimizer.swap_lr_multiplier: must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        output_dir: Where the result goes; it must not exist yet, or be empty.
        overwrite: Replace what is in ``output_dir``, once the run is complete.
        swap: A swap by name, or a mapping with its ``name`` and options; None or ``"none"`` patches nothing: the
            control, or a model that was saved patched and is trained on.
        part: Which attention of several to patch, as in :func:`attnswap.patch`; None: the decoder's own.
        layers: Which layers to patch, as in :func:`attnswap.patch`; None: all.
        heads: Which heads to patch; None: all.
        ramp: lambda of the swap while training, from 0 (as before) to 1 (the swap); where stages move it, leave it out.
        model: See :class:`ModelSection`.
        data: See :class:`DataSection`.
        training: Fields of ``transformers.TrainingArguments``.
        optimizer: See :class:`OptimizerSection`.
        lora: See :class:`LoraSection`; None: train the weights themselves.
        stages: One after another, sharing ``training.max_steps``; none: cross entropy throughout. See
            :class:`attnswap.training.StageSection`.
        teacher: The model that stages learn from, as ``model.reference``; None: the model itself, as it was before the
            swap and the training.
        fit: Start the swap by a least-squares fit; see :class:`FitSection`. None: at its own start.
    """

    output_dir: str
    overwrite: bool = False
    swap: str | dict[str, Any] | None = None
    part: str | None = None
    layers: int | str | list[int] | None = None
    heads: list[int] | None = None
    ramp: float = 1.0
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    lora: LoraSection | None = None
    stages: list[StageSection] = field(default_factory=list)
    teacher: str | None = None
    fit: FitSection | None = None

    def __post_init__(self) -> None:
        require(self.output_dir.strip() != "", "output_dir: must name a directory")
        require(0 <= self.ramp <= 1, "ramp: must lie between 0 and 1")
        if self.swap == "none":
            object.__setattr__(self, "swap", None)
        frozen = self.optimizer.freeze == "all_but_swap"
        if self.swap is None:
            given = (self.part, self.layers, self.heads)
            require(given == (None,) * 3, "part, layers, heads: nothing is swapped, so leave them out")
        else:
            _resolve(self.swap)
        require(not (frozen and self.lora), 'lora: goes with "optimizer.freeze: none", which trains the adapters')
        object.__setattr__(self, "training", check_training(self.training))
        if self.stages:
            self._check_stages()
        else:
            require(self.teacher is None, "teacher: goes with stages, which learn from it")

    def _check_stages(self) -> None:
        require(self.training.get("max_steps", -1) > 0, "training.max_steps: stages share these steps, so give them")
        ramps = [stage.ramp for stage in self.stages if stage.ramp is not None]
        if ramps:
            require(self.ramp == 1.0, "ramp: stages move it, so leave it out")
            require(ramps[-1].end == 1.0, "stages: the last ramp must end at 1, or the result is not the swap")
            require(
                not self.training.get("load_best_model_at_end"),
                "training.load_best_model_at_end: the best loss may be one at a lambda below 1",
            )
        rates = [stage.name for stage in self.stages if stage.learning_rate is not None]
        require(
            not rates or self.training.get("learning_rate") != 0,
            f"training.learning_rate: 0 would be the rate of {', '.join(rates)} too, whose own are relative to it",
        )
        looking = [stage.name for stage in self.stages if stage.loss.looks_inside]
        again = [key for key in ("gradient_checkpointing", "activation_checkpointing") if self.training.get(key)]
        require(
            not (looking and again),
            f"training.{''.join(again[:1])}: transfer, regression and sinks look at each layer as it runs, so leave it "
            f"out for {', '.join(looking)}",
        )
        require(
            self.optimizer.freeze == "none" or all(stage.train != "attention" for stage in self.stages),
            'stages: "train: attention" goes with "optimizer.freeze: none"',
        )


def check_training(values: dict[str, Any]) -> dict[str, Any]:
    """Checks keys and types of the ``training`` section against ``TrainingArguments``.

    Raises:
        ConfigError: A key is unknown or reserved, or a value has the wrong type.
    """
    hints = _training_types()
    known = [name for name in hints if name not in RESERVED]
    checked = {}
    for key, value in values.items():
        if key in RESERVED:
            raise ConfigError(f"training.{key}: cannot be set here: {RESERVED[key]}")
        if key not in known:
            raise unknown_key(key, known, "training")
        checked[key] = coerce(value, hints[key], join("training", key))
        if key in COUNTS:
            require(checked[key] >= COUNTS[key], f"training.{key}: must be at least {COUNTS[key]}")
        if key == "max_steps":
            require(checked[key] > 0 or checked[key] == -1, "training.max_steps: must be positive, or -1 for epochs")
        if key == "num_train_epochs":
            require(checked[key] > 0, "training.num_train_epochs: must be positive")
        if key == "learning_rate":
            require(checked[key] >= 0, "training.learning_rate: must not be negative")
        if key == "metric_for_best_model":
            require(checked[key] in ("loss", "eval_loss"), f"training.{key}: the loss is all that is evaluated")
        if key == "greater_is_better":
            require(not checked[key], f"training.{key}: a smaller loss is better")
    return checked


@cache
def _training_types() -> dict[str, Any]:
    hints = get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Reads a recipe and applies overrides from the command line.

    Args:
        path: A YAML file of at most 32 kB.
        overrides: ``key=value`` with a dotted key; the value is YAML, e.g. ``training.max_steps=50``. Entries of lists
            go by their number: ``stages.0.share=0.5``.

    Raises:
        ConfigError: The file or an override is not a valid recipe; the message names the key.
    """
    mapping = read_yaml(path)
    return parse_config(mapping, overrides)


def parse_config(mapping: Any, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Builds a recipe from plain values; see :func:`load_config`."""
    if overrides and isinstance(mapping, dict):
        mapping = _copy(mapping)
        for override in overrides:
            _apply(mapping, override)
    return from_mapping(TrainConfig, mapping)


def to_mapping(config: TrainConfig) -> dict[str, Any]:
    """Returns the resolved recipe as plain values, every default filled in; :func:`parse_config` reads it back."""
    return {**dataclasses.asdict(config), "swap": config.swap if config.swap is not None else "none"}


def as_run(config: TrainConfig) -> dict[str, Any]:
    """Returns what stands beside a result: its recipe, but for where it was resumed from, which says nothing of it."""
    values = to_mapping(config)
    values["training"] = {k: v for k, v in values["training"].items() if k != "resume_from_checkpoint"}
    return values


def _apply(mapping: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f'"{override}": an override is written key=value, e.g. training.max_steps=50')
    held: Any = mapping
    for i, part in enumerate(parts[:-1]):
        place = _place(held, part, override)
        inner = held.get(place) if isinstance(held, dict) else held[place]
        if part == "swap" and i == 0 and isinstance(inner, str):  # swap: ssmax is short for swap: {name: ssmax}
            inner = {"name": inner}
        inner = {} if inner is None else inner
        if not isinstance(inner, dict | list):
            raise ConfigError(f'"{override}": {".".join(parts[: i + 1])} is {show(inner)}, which has no keys')
        held[place] = inner
        held = inner
    held[_place(held, parts[-1], override)] = parse_value(text, f'"{key}"')


def _place(held: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    if isinstance(held, dict):
        return part
    if not part.isdecimal() or int(part) >= len(held):
        raise ConfigError(f'"{override}": "{part}" is none of the {len(held)} entries of a list, counted from 0')
    return int(part)


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value
