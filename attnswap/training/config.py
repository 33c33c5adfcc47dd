"""The recipe of a training run, as dataclasses that are read from YAML and checked strictly."""

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
    "do_eval": "set training.eval_strategy instead",
    "do_predict": "a run makes no predictions",
    "remove_unused_columns": "the data has only columns that the model takes",
    "label_names": "the labels are always in the column labels",
    "use_cache": "with a KV cache, packed documents would see each other",
    "label_smoothing_factor": "the loss is cross entropy without smoothing",
    "use_liger_kernel": "the chunked loss replaces it",
    "liger_kernel_config": "the chunked loss replaces it",
    "prediction_loss_only": "evaluation always sums the loss over tokens",
    "parallelism_config": "it cannot be written in YAML",
    "auto_find_batch_size": "another batch size would be another experiment",
}
"""Fields of TrainingArguments that a recipe cannot set, with the reason."""

COUNTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
}
"""Minimum values of some fields of TrainingArguments, which Trainer would check only in the middle of a run."""


def _resolve(swap: str | dict[str, Any]) -> None:
    try:
        swaps.resolve(swap)
    except TypeError as error:  # the check of an option compared values of different types
        raise ConfigError(f"swap: an option has the wrong type: {error}") from None


@dataclass(frozen=True)
class ModelSection:
    """The model to train.

    Attributes:
        reference: A hub name, a directory, a ``.gguf`` file or ``"embedded"``.
        tokenizer: Where the tokenizer is, in the same form; None: with the model.
        dtype: Dtype of the weights while training. Use ``training.bf16`` for mixed precision.
    """

    reference: str = EMBEDDED
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


@dataclass(frozen=True)
class DataSection:
    """The text to train and evaluate on.

    Attributes:
        source: ``"offline"`` (the sources of Python's standard library), ``"files"`` or ``"hub"``.
        kind: ``"text"``: every token has a label. ``"chat"``: only the assistant's tokens have labels; files are then
            JSON lines with ``messages``.
        files: Paths or glob patterns, for ``source: files``. Each line of a ``.jsonl`` file is an object with a
            document under the key ``text``; other files are plain text. All may be gzipped (``.gz``).
        documents: What a document is: a ``"file"`` (of JSON lines: a line), or a ``"paragraph"`` between blank lines.
        name: Name of the data set, for ``source: hub``.
        config: Configuration of that data set.
        split: Split of that data set; slices such as ``train[:1000]`` work.
        column: Column of that data set, or key of JSON lines; None: ``text``, or ``messages`` for chat.
        sequence_length: Tokens per window.
        pack: Whether a window may contain several documents, which position ids keep apart.
        eval_fraction: Share of the documents that are held out for evaluation; at least one document.
        eval_windows: Maximum number of windows for evaluation; None: all.
        max_documents: Number of documents to use, chosen by ``seed``; None: all.
        seed: Seed that chooses the held-out documents.
        cache_dir: Directory of prepared data; None: the cache of ``datasets``.
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
        require(
            self.kind == "text" or self.source != "offline",
            "data.kind: the offline text has no conversations: use text",
        )


@dataclass(frozen=True)
class LoraSection:
    """Train LoRA adapters instead of the model's weights. They are merged into the saved model.

    Attributes:
        r: Rank.
        alpha: The update is scaled by ``alpha / r``.
        dropout: Dropout probability of the adapters' inputs.
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
    """Options for training the swap's parameters.

    Attributes:
        swap_lr_multiplier: Ratio of the learning rate of the swap's parameters to that of the other parameters. The
            swap's parameters have no weight decay.
        freeze: ``"all_but_swap"`` freezes all parameters but the swap's.
    """

    swap_lr_multiplier: float = 10.0
    freeze: Literal["none", "all_but_swap"] = "none"

    def __post_init__(self) -> None:
        require(self.swap_lr_multiplier > 0, "optimizer.swap_lr_multiplier: must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """The recipe of a training run.

    Attributes:
        output_dir: Directory of the result; it must not exist yet, or be empty.
        overwrite: Whether the result replaces the content of ``output_dir``, once the run is complete.
        swap: Name of a swap, or a mapping with its ``name`` and options. None or ``"none"``: patch nothing, for a
            control, or to continue training a patched model.
        part: Which kind of attention to patch, as in :func:`attnswap.patch`; None: the decoder's self-attention.
        layers: Which layers to patch, as in :func:`attnswap.patch`; None: all.
        heads: Which heads to patch; None: all.
        ramp: lambda during training, from 0 (the original attention) to 1 (the swap); not with stages that have ramps.
        model: See :class:`ModelSection`.
        data: See :class:`DataSection`.
        training: Fields of ``transformers.TrainingArguments`` by name.
        optimizer: See :class:`OptimizerSection`.
        lora: See :class:`LoraSection`; None: train the model's weights.
        stages: Stages that run one after another and share ``training.max_steps``; see
            :class:`attnswap.training.StageSection`. None given: cross entropy in all steps.
        teacher: Hub name, directory or file of the teacher for stages with kl or transfer; None: the model before
            patching and training.
        fit: Calibrate the swap by least squares before training; see :class:`FitSection`. None: no calibration.
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
            require(given == (None,) * 3, "part, layers, heads: leave them out of a recipe without a swap")
        else:
            _resolve(self.swap)
        require(not (frozen and self.lora), 'lora: needs "optimizer.freeze: none", or the adapters would be frozen')
        object.__setattr__(self, "training", check_training(self.training))
        if self.stages:
            self._check_stages()
        else:
            require(self.teacher is None, "teacher: only stages use a teacher: add stages, or leave it out")

    def _check_stages(self) -> None:
        require(self.training.get("max_steps", -1) > 0, "training.max_steps: set it, since stages are shares of it")
        ramps = [stage.ramp for stage in self.stages if stage.ramp is not None]
        if ramps:
            require(self.ramp == 1.0, "ramp: leave it out, since stages have ramps")
            require(ramps[-1].end == 1.0, "stages: the last ramp must end at 1, so that the result computes the swap")
            require(
                not self.training.get("load_best_model_at_end"),
                "training.load_best_model_at_end: set it to false, since the best loss may be at a lambda below 1",
            )
        rates = [stage.name for stage in self.stages if stage.learning_rate is not None]
        require(
            not rates or self.training.get("learning_rate") != 0,
            f"training.learning_rate: must not be 0, since the rates of {', '.join(rates)} are computed relative to it",
        )
        observing = [stage.name for stage in self.stages if stage.loss.observes_layers]
        checkpointing = [
            key for key in ("gradient_checkpointing", "activation_checkpointing") if self.training.get(key)
        ]
        require(
            not (observing and checkpointing),
            f"training.{''.join(checkpointing[:1])}: leave it out, since it runs each layer twice, and the losses "
            f"transfer, regression and sinks of {', '.join(observing)} observe the forward of each layer",
        )
        require(
            self.optimizer.freeze == "none" or all(stage.train != "attention" for stage in self.stages),
            'stages: "train: attention" needs "optimizer.freeze: none"',
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
            require(checked[key] in ("loss", "eval_loss"), f"training.{key}: must be eval_loss, the only metric")
        if key == "greater_is_better":
            require(not checked[key], f"training.{key}: must be false, since a smaller loss is better")
    return checked


@cache
def _training_types() -> dict[str, Any]:
    hints = get_type_hints(TrainingArguments)
    return {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Reads a recipe and applies overrides from the command line.

    Args:
        path: A YAML file of at most 32 kB.
        overrides: ``key=value`` with a dotted key and a value in YAML, e.g. ``training.max_steps=50``. Entries of lists
            are addressed by number: ``stages.0.share=0.5``.

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
    """Returns a recipe as plain values, defaults included; :func:`parse_config` reads them back."""
    return {**dataclasses.asdict(config), "swap": config.swap if config.swap is not None else "none"}


def as_run(config: TrainConfig) -> dict[str, Any]:
    """Returns a recipe for the folder of a result: as plain values, without the checkpoint it was resumed from."""
    values = to_mapping(config)
    values["training"] = {k: v for k, v in values["training"].items() if k != "resume_from_checkpoint"}
    return values


def _apply(mapping: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f'"{override}": write an override as key=value, e.g. training.max_steps=50')
    container: Any = mapping
    for i, part in enumerate(parts[:-1]):
        key_or_index = _key_or_index(container, part, override)
        inner = container.get(key_or_index) if isinstance(container, dict) else container[key_or_index]
        if part == "swap" and i == 0 and isinstance(inner, str):  # swap: ssmax is short for swap: {name: ssmax}
            inner = {"name": inner}
        inner = {} if inner is None else inner
        if not isinstance(inner, dict | list):
            raise ConfigError(f'"{override}": {".".join(parts[: i + 1])} is {show(inner)}, which has no keys')
        container[key_or_index] = inner
        container = inner
    container[_key_or_index(container, parts[-1], override)] = parse_value(text, f'"{key}"')


def _key_or_index(container: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    if isinstance(container, dict):
        return part
    if not part.isdecimal() or int(part) >= len(container):
        raise ConfigError(f'"{override}": "{part}" is not an index of the list, which has {len(container)} entries')
    return int(part)


def _copy(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value
