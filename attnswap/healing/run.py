"""One recipe with its controls: the healed model, the same recipe without a swap, the swap alone, the original."""

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
from attnswap.healing.alike import check_alike, differences
from attnswap.healing.experiment import Experiment
from attnswap.healing.measuring import Bench, read, say
from attnswap.loading import load_config_of, load_model, load_tokenizer
from attnswap.surgery.entry import is_patched
from attnswap.text import evaluation_text
from attnswap.training.config import TrainConfig, load_config, to_mapping
from attnswap.training.durable import latest_checkpoint
from attnswap.training.inputs import gather_inputs
from attnswap.training.output import Output
from attnswap.training.run import FITTED, train
from attnswap.training.scarcity import warn_of_leak


@dataclass
class Measured:
    """What an experiment found, by the name of each model.

    Attributes:
        losses: Perplexities by context of ``original``, ``control``, ``unhealed``, ``healed`` and ``bypassed`` (the
            healed weights with their swaps passed by), and of ``fitted`` where the recipe fits the swap first. What
            overflows of ``unhealed`` and ``fitted`` is missing.
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
    init_process_group(None)
    config = experiment.config
    for name in ("healed", *(["control"] if experiment.control is None and experiment.control_learns else [])):
        Output(experiment.out / name, overwrite=config.overwrite).check_place()
    check_writable(experiment.out / "result", "output_dir")
    load_config_of(config.model.reference)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.reference)
    healed, control = replace(config, output_dir=str(experiment.out / "healed")), experiment.control
    alone = experiment.control_config if control is None and experiment.control_learns else None
    _check_inputs(experiment, tokenizer, [healed] if alone is None else [healed, alone])
    trained = {"healed": read(_trained(healed) / "summary.json")}
    folder = Path(healed.output_dir)
    if alone is not None:
        if _pending(alone) is not None:
            _check_processes(config, trained["healed"])
        control = _trained(alone)
    elif control is None:
        control = folder
    trained |= {"control": read(control / "summary.json")} if control != folder else {}
    check_alike(trained)
    bench = Bench(experiment, tokenizer)
    original = config.model.reference
    losses = {"original": bench.losses(control / "original", partial(bench.load, original))}
    if control == folder or (trained["control"].get("steps_at_rest") and same_weights(str(control), original)):
        losses["control"] = losses["original"]
    else:
        losses["control"] = bench.losses(control / "control", partial(bench.load, control))
    with _unless_infinite("unhealed"):
        losses["unhealed"] = bench.losses(folder / "unhealed", bench.unhealed)
    if config.fit is not None:
        with _unless_infinite("fitted"):
            losses["fitted"] = bench.losses(folder / "fitted", partial(bench.unhealed, fitted=folder / FITTED))
    losses["healed"] = bench.losses(folder / "healed", partial(bench.load, folder))
    losses["bypassed"] = bench.losses(folder / "bypassed", partial(bench.load, folder), bypass=True)
    structure = {"original": bench.structure(control / "original", partial(bench.load, original))}
    with _unless_infinite("unhealed"):
        structure["unhealed"] = bench.structure(folder / "unhealed", bench.unhealed)
    structure["healed"] = bench.structure(folder / "healed", partial(bench.load, folder))
    fidelity = {"healed": bench.fidelity(folder / "healed", folder, original)}
    return Measured(
        losses, structure, fidelity, trained, read(folder / "movement.json"), read(folder / "training_log.json")
    )


@contextmanager
def _unless_infinite(name: str) -> Iterator[None]:
    """Leaves out a model that nobody has trained to be sound, where what it computes overflows."""
    try:
        yield
    except NumericsError as error:
        say(f"{name} is left out of the result: {error}")


def _trained(config: TrainConfig) -> Path:
    """Returns the folder of a finished run of a recipe, which is trained or trained on if need be."""
    folder, pending = Path(config.output_dir), _pending(config)
    if pending is None:
        return folder
    say(f"training {folder.name}: {config.swap or 'no swap'}")
    done = train(pending)
    gc.collect()  # trainer and model hold on to each other, and the next model wants their memory
    if done.signal is not None:
        raise StoppedError(
            f"stopped by {done.signal.name} when {folder.name} was trained; the same command goes on from there"
        )
    return done.output_dir


def _pending(config: TrainConfig) -> TrainConfig | None:
    """Returns the recipe as it is to be run, which goes on from what an unfinished run left; None: it is finished."""
    folder = Path(config.output_dir)
    if (folder / "summary.json").is_file() and not _changed(config, folder, "the result"):
        return None
    unfinished = Output(folder, overwrite=False).partial
    left = latest_checkpoint(unfinished)
    if left is not None:
        changed = _changed(config, unfinished, "an unfinished run")
        if not changed and not config.training.get("save_only_model"):
            config = replace(config, training={**config.training, "resume_from_checkpoint": "latest"})
    return replace(config, overwrite=config.overwrite or left is not None)


def _changed(config: TrainConfig, folder: Path, what: str) -> bool:
    """Says whether a folder is of another recipe, which is refused unless it may be overwritten."""
    different = differences(to_mapping(config), to_mapping(load_config(folder / "recipe.yaml")))
    if different and not config.overwrite:
        raise ConfigError(
            f'"{folder}" holds {what} of another recipe: {", ".join(different)}; name another output_dir, or start '
            "anew with overwrite=true"
        )
    return bool(different)


def _check_processes(config: TrainConfig, healed: dict[str, Any]) -> None:
    """Refuses to train a control by other batches than those of a healed model that was there already."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    ours, theirs = rank_and_world_size()[1], healed["windows_per_step"]
    for name in names:
        ours *= config.training.get(name, 1)
    if ours != theirs:
        raise ConfigError(
            f"the healed model was trained on {theirs} windows a step, and its control would be on {ours}: run this by "
            "as many processes, too (accelerate launch --module attnswap.cli heal ...)"
        )


def _check_inputs(experiment: Experiment, tokenizer: PreTrainedTokenizerBase, runs: list[TrainConfig]) -> None:
    """Refuses what cannot be trained or measured, before any model is loaded where that can be told."""
    if experiment.control is not None:
        read(experiment.control / "summary.json")
        load_config_of(experiment.control)
    pending = [one for one in map(_pending, runs) if one is not None]
    for one in pending:
        data = gather_inputs(one).data
    if pending:
        text = evaluation_text() if experiment.text is None else experiment.text
        warn_of_leak(data.documents["document"], [text], "the text to measure on")
    if any(one.output_dir == runs[0].output_dir for one in pending):
        _check_measurable(experiment, tokenizer)


def _check_measurable(experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses contexts that the text or the model is too short for, before anything is trained."""
    corpus = load_corpus(tokenizer, experiment.text)
    plan(corpus, tokenizer, experiment.contexts, max_tokens=experiment.max_tokens)
    model = load_model(experiment.config.model.reference, dtype=torch.float32)
    if is_patched(model):
        raise ConfigError(
            f'model.reference: "{experiment.config.model.reference}" was saved with swaps, and an experiment needs the '
            'model before any; to train it on, run "attnswap train"'
        )
    longest = max(experiment.contexts)
    Scorer(model).check_positions(longest)
    measure_structure(model, tokenizer, text=experiment.text, window=min(FIRST_QUERY + 16, longest), windows=1)


def same_weights(reference: str, other: str) -> bool:
    """Says whether two models hold the same weights to the last bit."""
    ours, theirs = (load_model(name, dtype=torch.float32).state_dict() for name in (reference, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
