"""One recipe with its controls: the healed model, the same recipe without a swap, the swap alone, the original."""

import hashlib
import json
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import attnswap
from attnswap.errors import CheckpointError, ConfigError
from attnswap.evaluation import CONTEXTS, Evaluation, evaluate_perplexity
from attnswap.evaluation.bootstrap import check_comparable
from attnswap.evaluation.corpus import load_corpus
from attnswap.evaluation.fidelity import measure_fidelity
from attnswap.evaluation.result import write_atomically
from attnswap.evaluation.scoring import Scorer
from attnswap.evaluation.structure import measure_structure
from attnswap.evaluation.windows import plan
from attnswap.loading import load_model, load_tokenizer
from attnswap.processes import default_device, join, place
from attnswap.text import evaluation_text
from attnswap.training.config import TrainConfig, load_config, parse_config, to_mapping
from attnswap.training.durable import latest_checkpoint
from attnswap.training.movement import start_from
from attnswap.training.run import FITTED, train
from attnswap.training.stages import plan_of, without_swaps

SWAP_KEYS = ("swap", "part", "layers", "heads", "fit")
"""What a recipe and its control differ in."""
RUN_KEYS = ("output_dir", "overwrite")
"""What says nothing about a result."""


@dataclass(frozen=True)
class Experiment:
    """What is measured of a recipe, and where.

    Attributes:
        config: The recipe, with a swap.
        out: Where models and measurements go; what is there already of the same recipe is not done again.
        control: The finished control of another swap's experiment with the same recipe; None: train one.
        text: The text to measure on; None: the offline evaluation text.
        text_id: Its name in reports.
        contexts: Context lengths in tokens.
        max_tokens: Scored tokens at each.
        dtype: Dtype of the models when measured.
        device: Where they are measured; None: this process's accelerator if there is one.
    """

    config: TrainConfig
    out: Path
    control: Path | None = None
    text: str | None = None
    text_id: str | None = None
    contexts: tuple[int, ...] = CONTEXTS
    max_tokens: int = 16384
    dtype: torch.dtype = torch.bfloat16
    device: str | None = None

    def __post_init__(self) -> None:
        if self.config.swap is None:
            raise ConfigError('swap: an experiment heals a swap; for the control alone, run "attnswap train"')
        if self.control is not None:
            self._check_control(self.control)

    @property
    def control_learns(self) -> bool:
        """Whether the recipe trains anything without its swap; if not, its control is the original."""
        plan = plan_of(self.config)
        return self.config.optimizer.freeze == "none" and (not plan or bool(without_swaps(plan)))

    @property
    def control_config(self) -> TrainConfig:
        """The recipe without its swap."""
        changes: dict[str, Any] = dict.fromkeys(SWAP_KEYS)
        return replace(self.config, **changes, output_dir=str(self.out / "control"))

    def _check_control(self, folder: Path) -> None:
        if not self.control_learns:
            raise ConfigError("--control: without its swap this recipe trains nothing, so its control is the original")
        try:
            theirs = to_mapping(load_config(folder / "recipe.yaml"))
        except ConfigError as error:
            raise ConfigError(f"--control: {error}") from None
        different = differences(to_mapping(self.control_config), theirs)
        if different:
            raise ConfigError(
                f'--control: "{folder}" was trained otherwise than this recipe without its swap: {", ".join(different)}'
            )


@dataclass
class Measured:
    """What an experiment found, by the name of each model.

    Attributes:
        losses: Perplexities by context of ``original``, ``control``, ``unhealed``, ``healed`` and ``bypassed`` (the
            healed weights with their swaps passed by), and of ``fitted`` where the recipe fits the swap first.
        structure: What attention does.
        fidelity: Divergence from the original.
        training: The summaries of ``healed`` and, where there is something to train, ``control``.
        movement: How far the swap's parameters moved.
        log: The healed model's training log.
    """

    losses: dict[str, Evaluation]
    structure: dict[str, dict[str, Any]]
    fidelity: dict[str, dict[str, Any]]
    training: dict[str, dict[str, Any]]
    movement: dict[str, dict[str, float]]
    log: list[dict[str, Any]]


def heal(experiment: Experiment) -> Measured:
    """Trains what is missing of an experiment and measures all of its models.

    Args:
        experiment: The experiment.

    Raises:
        ConfigError: The recipe or its control does not fit, or what would be measured cannot be.
        StoppedError: A signal asked for the end; the same call goes on from there, unless the recipe keeps no
            optimizer states (``training.save_only_model``).
    """
    config = experiment.config
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.reference)
    if not (experiment.out / "healed" / "summary.json").is_file():
        _check_measurable(experiment, tokenizer)
    healed = _trained(replace(config, output_dir=str(experiment.out / "healed")))
    control = experiment.control
    if control is None:
        control = _trained(experiment.control_config) if experiment.control_learns else healed
    trained = {"healed": _read(healed / "summary.json")}
    trained |= {"control": _read(control / "summary.json")} if control != healed else {}
    bench = _Bench(experiment, tokenizer)
    original = config.model.reference
    losses = {"original": bench.losses(control / "original", lambda: bench.load(original))}
    if control == healed or (trained["control"].get("steps_at_rest") and same_weights(str(control), original)):
        losses["control"] = losses["original"]
    else:
        losses["control"] = bench.losses(control / "control", lambda: bench.load(control))
    losses["unhealed"] = bench.losses(healed / "unhealed", bench.unhealed)
    if config.fit is not None:
        losses["fitted"] = bench.losses(healed / "fitted", lambda: bench.unhealed(healed / FITTED))
    losses["healed"] = bench.losses(healed / "healed", lambda: bench.load(healed))
    losses["bypassed"] = bench.losses(healed / "bypassed", lambda: bench.load(healed), bypass=True)
    structure = {
        "original": bench.structure(control / "original", lambda: bench.load(original)),
        "unhealed": bench.structure(healed / "unhealed", bench.unhealed),
        "healed": bench.structure(healed / "healed", lambda: bench.load(healed)),
    }
    fidelity = {"healed": bench.fidelity(healed / "healed", healed, original)}
    return Measured(
        losses, structure, fidelity, trained, _read(healed / "movement.json"), _read(healed / "training_log.json")
    )


def _trained(config: TrainConfig) -> Path:
    """Returns the folder of a finished run of a recipe, which is trained or trained on if need be."""
    folder = Path(config.output_dir)
    if (folder / "summary.json").is_file():
        different = differences(to_mapping(config), to_mapping(load_config(folder / "recipe.yaml")))
        if different:
            raise ConfigError(f'"{folder}" holds the result of another recipe: {", ".join(different)}')
        return folder
    partial = folder.with_name(folder.name + ".partial")
    left = latest_checkpoint(partial)
    same = left is not None and not differences(to_mapping(config), to_mapping(load_config(partial / "recipe.yaml")))
    if same and not config.training.get("save_only_model"):
        config = replace(config, training={**config.training, "resume_from_checkpoint": "latest"})
    say(f"training {folder.name}: {config.swap or 'no swap'}")
    return train(replace(config, overwrite=config.overwrite or left is not None)).output_dir


def _check_measurable(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses contexts that the text or the model is too short for, before anything is trained."""
    corpus = load_corpus(tokenizer, experiment.text)
    plan(corpus, tokenizer, experiment.contexts, max_tokens=experiment.max_tokens)
    model = load_model(experiment.config.model.reference, dtype=torch.float32)
    Scorer(model).check_positions(max(experiment.contexts))


def same_weights(reference: str, other: str) -> bool:
    """Says whether two models hold the same weights to the last bit."""
    ours, theirs = (load_model(name, dtype=torch.float32).state_dict() for name in (reference, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class _Bench:
    """Measures models and keeps what was measured in files."""

    def __init__(self, experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> None:
        self.experiment, self.tokenizer = experiment, tokenizer
        self._first: Evaluation | None = None
        self.longest = max(experiment.contexts)
        text = evaluation_text() if experiment.text is None else experiment.text
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.device = experiment.device or join(None) or default_device()

    def load(self, reference: str | Path) -> PreTrainedModel:
        return load_model(reference, dtype=torch.float32, device=self.device)

    def unhealed(self, fitted: Path | None = None) -> PreTrainedModel:
        """Returns the model with the recipe's swap and no training, or as far as training was told where to start."""
        config = self.experiment.config
        model = self.load(config.model.reference)
        assert config.swap is not None
        attnswap.patch(model, config.swap, part=config.part, layers=config.layers, heads=config.heads)
        if fitted is not None:
            start_from(model, fitted)
        return model

    def losses(self, path: Path, load: Any, *, bypass: bool = False) -> Evaluation:
        file = path.with_name(f"{path.name}-losses.json")
        found = self._known(file)
        if found is None:
            say(f"measuring {path.name}")
            model = load()
            model.to(dtype=self.experiment.dtype)
            with attnswap.bypassed(model) if bypass else nullcontext():
                found = evaluate_perplexity(
                    model,
                    self.tokenizer,
                    text=self.experiment.text,
                    contexts=self.experiment.contexts,
                    max_tokens=self.experiment.max_tokens,
                    positions=False,
                    baseline=self._first,
                    model_id=path.name,
                    corpus_id=self.experiment.text_id,
                    quiet=not sys.stderr.isatty(),
                )
            if place()[0] == 0:
                found.save(file)
        self._first = self._first or found
        return found

    def _known(self, file: Path) -> Evaluation | None:
        if not file.is_file():
            return None
        found = Evaluation.load(file)
        dtype = str(self.experiment.dtype).removeprefix("torch.")
        if found.protocol.contexts != tuple(sorted(self.experiment.contexts)) or found.env["dtype"] != dtype:
            return None
        if self._first is not None:
            try:
                check_comparable(found.protocol, self._first.protocol)
            except ConfigError:
                return None
            return found
        scored, wanted = found.protocol.scored_tokens, self.experiment.max_tokens
        whole = scored < wanted and found.protocol.end == found.corpus["tokens"]
        return found if found.corpus["sha256"] == self.digest and (scored == wanted or whole) else None

    def structure(self, path: Path, load: Any) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            window = min(1024, self.longest)
            found = measure_structure(load(), self.tokenizer, text=self.experiment.text, window=window, windows=2)
            return found.to_dict()

        return self._kept(path.with_name(f"{path.name}-structure.json"), measure)

    def fidelity(self, path: Path, reference: Path, original: str) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            models = [self.load(name) for name in (reference, original)]
            for model in models:
                model.to(dtype=self.experiment.dtype)  # type: ignore[call-arg]
            context, text = min(2048, self.longest), self.experiment.text
            return measure_fidelity(models[0], models[1], self.tokenizer, text=text, context=context).to_dict()

        return self._kept(path.with_name(f"{path.name}-fidelity.json"), measure)

    def _kept(self, file: Path, measure: Any) -> dict[str, Any]:
        """Returns what a file holds if it was measured on this experiment's text and windows, else measures it."""
        seen = {"text_sha256": self.digest, "longest": self.longest, "dtype": str(self.experiment.dtype)}
        if file.is_file():
            kept: dict[str, Any] = _read(file)
            if kept.pop("measured_on", None) == seen:
                return kept
        say(f"measuring {file.stem}")
        found: dict[str, Any] = measure()
        if place()[0] == 0:
            write_atomically(file, (json.dumps({**found, "measured_on": seen}, indent=1) + "\n").encode())
        return found


def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> list[str]:
    """Names the keys in which two recipes differ, but for where and how they run."""
    found: list[str] = []
    if not path and ours.get("swap") == "none":  # without a swap, lambda says nothing
        ours, theirs = _as_control(ours), _as_control(theirs)
    for key in sorted(ours.keys() | theirs.keys()):
        if (not path and key in RUN_KEYS) or key == "resume_from_checkpoint":
            continue
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key}")
    return found


def _as_control(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe as far as it matters without a swap: its stages by their steps, and without those left out."""
    config = parse_config(values)
    kept = without_swaps(plan_of(config))
    stages = []
    for stage in kept:
        loss = replace(stage.section.loss, regression=0.0, sinks=0.0)
        stages.append({**asdict(replace(stage.section, ramp=None, loss=loss, share=1.0)), "steps": stage.steps})
    training = {key: value for key, value in values["training"].items() if not kept or key != "max_steps"}
    optimizer = {key: value for key, value in values["optimizer"].items() if key != "swap_lr_multiplier"}
    return {**values, "stages": stages, "training": training, "optimizer": optimizer}


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f'cannot read "{file}": {error}') from None


def say(message: str) -> None:
    """Prints a line of progress, in the first process."""
    if place()[0] == 0:
        print(message, flush=True)
