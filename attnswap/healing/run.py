"""Run an experiment: train the healed model and its control, and measure them beside the original."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from attnswap.distributed import init_process_group, rank_and_world_size
from attnswap.errors import ConfigError, NumericsError, StoppedError
from attnswap.evaluation import Evaluation
from attnswap.evaluation.corpus import load_corpus
from attnswap.evaluation.scoring import Scorer
from attnswap.evaluation.structure import FIRST_QUERY, measure_structure
from attnswap.evaluation.windows import plan
from attnswap.folders import check_writable
from attnswap.healing.comparable import check_same_training, recipe_differences
from attnswap.healing.experiment import Experiment
from attnswap.healing.measurements import CachedMeasurements, print_progress, read_json
from attnswap.loading import load_config_of, load_model, load_tokenizer
from attnswap.surgery.entry import is_patched
from attnswap.text import evaluation_text
from attnswap.training.config import TrainConfig, load_config, to_mapping
from attnswap.training.data_warnings import warn_of_leak
from attnswap.training.durable import latest_checkpoint
from attnswap.training.inputs import gather_inputs
from attnswap.training.output import Output
from attnswap.training.run import FITTED, train


@dataclass
class Measured:
    """The measurements of an experiment, by the names of its models.

    Attributes:
        losses: Perplexities by context of ``original``, ``control``, ``unhealed`` (patched, not trained), ``healed``
            and ``bypassed`` (the healed weights with softmax in place of the swap), and ``fitted`` if the recipe fits
            the swap. ``unhealed`` and ``fitted`` are missing if their losses are not finite.
        structure: Statistics of attention weights and hidden states.
        fidelity: Divergence from the original.
        training: The summaries of ``healed`` and, if the control has something to train, of ``control``.
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
    """Trains the models of an experiment that are not trained yet, and measures all of its models.

    Args:
        experiment: The experiment.

    Raises:
        ConfigError: The recipe cannot be run, its control does not match, or a measurement is impossible.
        StoppedError: A signal such as SIGTERM was received. The same call resumes the training, unless the recipe saves
            no optimizer states (``training.save_only_model``).
    """
    init_process_group(None)
    config = experiment.config
    for name in ("healed", *(["control"] if experiment.control is None and experiment.control_learns else [])):
        Output(experiment.out / name, overwrite=config.overwrite).check_folder()
    check_writable(experiment.out / "result", "output_dir")
    load_config_of(config.model.reference)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.reference)
    healed, control = replace(config, output_dir=str(experiment.out / "healed")), experiment.control
    own_control = experiment.control_config if control is None and experiment.control_learns else None
    _check_inputs(experiment, tokenizer, [healed] if own_control is None else [healed, own_control])
    trained = {"healed": read_json(_train_or_reuse(healed) / "summary.json")}
    folder = Path(healed.output_dir)
    if own_control is not None:
        if _config_to_run(own_control) is not None:
            _check_processes(config, trained["healed"])
        control = _train_or_reuse(own_control)
    elif control is None:
        control = folder
    trained |= {"control": read_json(control / "summary.json")} if control != folder else {}
    check_same_training(trained)
    measurements = CachedMeasurements(experiment, tokenizer)
    original = config.model.reference
    losses = {"original": measurements.perplexity(control / "original", partial(measurements.load, original))}
    if control == folder or (trained["control"].get("steps_at_rest") and same_weights(str(control), original)):
        losses["control"] = losses["original"]
    else:
        losses["control"] = measurements.perplexity(control / "control", partial(measurements.load, control))
    with _skipped_if_not_finite("unhealed"):
        losses["unhealed"] = measurements.perplexity(folder / "unhealed", measurements.unhealed)
    if config.fit is not None:
        with _skipped_if_not_finite("fitted"):
            losses["fitted"] = measurements.perplexity(
                folder / "fitted", partial(measurements.unhealed, fitted=folder / FITTED)
            )
    losses["healed"] = measurements.perplexity(folder / "healed", partial(measurements.load, folder))
    losses["bypassed"] = measurements.perplexity(folder / "bypassed", partial(measurements.load, folder), ablate=True)
    structure = {"original": measurements.structure(control / "original", partial(measurements.load, original))}
    with _skipped_if_not_finite("unhealed"):
        structure["unhealed"] = measurements.structure(folder / "unhealed", measurements.unhealed)
    structure["healed"] = measurements.structure(folder / "healed", partial(measurements.load, folder))
    fidelity = {"healed": measurements.fidelity(folder / "healed", folder, original)}
    return Measured(
        losses,
        structure,
        fidelity,
        trained,
        read_json(folder / "movement.json"),
        read_json(folder / "training_log.json"),
    )


@contextmanager
def _skipped_if_not_finite(name: str) -> Iterator[None]:
    """Skips the measurement of an untrained model whose losses are not finite."""
    try:
        yield
    except NumericsError as error:
        print_progress(f"{name} is left out of the result: {error}")


def _train_or_reuse(config: TrainConfig) -> Path:
    """Returns the folder of a finished run of a recipe, which is started or resumed if it is not finished."""
    folder, to_run = Path(config.output_dir), _config_to_run(config)
    if to_run is None:
        return folder
    print_progress(f"training {folder.name}: {config.swap or 'no swap'}")
    done = train(to_run)
    gc.collect()  # trainer and model refer to each other, and the next model needs their memory
    if done.signal is not None:
        raise StoppedError(
            f"stopped by {done.signal.name} after the training of {folder.name}: continue with the same command"
        )
    return done.output_dir


def _config_to_run(config: TrainConfig) -> TrainConfig | None:
    """Returns the recipe to run, resumed from the checkpoint of an unfinished run; None if the run is finished."""
    folder = Path(config.output_dir)
    if (folder / "summary.json").is_file() and not _is_other_recipe(config, folder, "the result"):
        return None
    unfinished = Output(folder, overwrite=False).partial
    checkpoint = latest_checkpoint(unfinished)
    if checkpoint is not None:
        other_recipe = _is_other_recipe(config, unfinished, "an unfinished run")
        if not other_recipe and not config.training.get("save_only_model"):
            config = replace(config, training={**config.training, "resume_from_checkpoint": "latest"})
    return replace(config, overwrite=config.overwrite or checkpoint is not None)


def _is_other_recipe(config: TrainConfig, folder: Path, what: str) -> bool:
    """Whether a folder is of another recipe.

    Raises:
        ConfigError: It is of another recipe, and must not be overwritten.
    """
    different = recipe_differences(to_mapping(config), to_mapping(load_config(folder / "recipe.yaml")))
    if different and not config.overwrite:
        raise ConfigError(
            f'"{folder}" has {what} of a recipe with other values of {", ".join(different)}: name another output_dir, '
            "or start anew with overwrite=true"
        )
    return bool(different)


def _check_processes(config: TrainConfig, healed: dict[str, Any]) -> None:
    """Refuses to train a control with another batch size than that of an earlier run of the healed model."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    ours, theirs = rank_and_world_size()[1], healed["windows_per_step"]
    for name in names:
        ours *= config.training.get(name, 1)
    if ours != theirs:
        raise ConfigError(
            f"the healed model was trained on {theirs} windows per step, and its control would be on {ours}: use the "
            "same number of processes (accelerate launch --module attnswap.cli heal ...)"
        )


def _check_inputs(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, runs: list[TrainConfig]) -> None:
    """Checks that everything can be trained and measured, as far as possible before any model is loaded."""
    if experiment.control is not None:
        read_json(experiment.control / "summary.json")
        load_config_of(experiment.control)
    to_run = [run for run in map(_config_to_run, runs) if run is not None]
    for run in to_run:
        data = gather_inputs(run).data
    if to_run:
        text = evaluation_text() if experiment.text is None else experiment.text
        warn_of_leak(data.documents["document"], [text], "the text to measure on")
    if any(run.output_dir == runs[0].output_dir for run in to_run):
        _check_measurable(experiment, tokenizer)


def _check_measurable(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks, before anything is trained, that text and model are long enough for all contexts."""
    corpus = load_corpus(tokenizer, experiment.text)
    plan(corpus, tokenizer, experiment.contexts, max_tokens=experiment.max_tokens)
    model = load_model(experiment.config.model.reference, dtype=torch.float32)
    if is_patched(model):
        raise ConfigError(
            f'model.reference: "{experiment.config.model.reference}" was saved with swaps, and an experiment needs the '
            'model before patching; to continue its training, run "attnswap train"'
        )
    longest = max(experiment.contexts)
    Scorer(model).check_positions(longest)
    measure_structure(model, tokenizer, text=experiment.text, window=min(FIRST_QUERY + 16, longest), windows=1)


def same_weights(reference: str, other: str) -> bool:
    """Whether two models have the same weights, to the last bit."""
    ours, theirs = (load_model(name, dtype=torch.float32).state_dict() for name in (reference, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
