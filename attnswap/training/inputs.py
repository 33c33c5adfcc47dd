"""Everything a run needs except its model, checked before the model is loaded."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from attnswap import swaps
from attnswap.devices import warn_of_slow_bf16
from attnswap.errors import ConfigError
from attnswap.loading import load_config_of, load_tokenizer
from attnswap.surgery.entry import carrier_of
from attnswap.training.config import TrainConfig
from attnswap.training.data import Data, load_data
from attnswap.training.data_warnings import warn_of_data
from attnswap.training.durable import latest_checkpoint
from attnswap.training.output import Output
from attnswap.training.stages import Stage, control_stages, stages_of
from attnswap.training.trainer import windows_per_step


@dataclass(frozen=True)
class Inputs:
    """Everything a run needs except its model.

    Attributes:
        config: The recipe, with the path of the checkpoint to resume from.
        output: The output directory.
        plan: The stages. Those of a control leave out the stages that train only swaps.
        args: The arguments of Trainer.
        tokenizer: The model's tokenizer.
        data: The data to train and evaluate on.
        fit_data: The data to fit the swap to; None: the swap is not fitted.
    """

    config: TrainConfig
    output: Output
    plan: list[Stage]
    args: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    data: Data
    fit_data: Data | None


def gather_inputs(config: TrainConfig) -> Inputs:
    """Loads and checks everything that a recipe names except its model.

    Writes nothing but the cache of prepared data.

    Raises:
        ConfigError: The recipe names something that does not exist, its values contradict each other, or its output
            directory is not empty.
    """
    output = Output(Path(config.output_dir), overwrite=config.overwrite)
    if config.training.get("resume_from_checkpoint") in ("latest", True):
        latest = latest_checkpoint(output.partial)
        resumed = {**config.training, "resume_from_checkpoint": None if latest is None else str(latest)}
        config = replace(config, training=resumed)
    output.check(config.training.get("resume_from_checkpoint"))
    swapped_before = _check_models(config)
    plan = _plan(config, swapped_before)
    steps_of_plan = {"max_steps": sum(stage.steps for stage in plan)} if plan else {}
    args = training_arguments(replace(config, training={**config.training, **steps_of_plan}), output.partial)
    if args.bf16:
        warn_of_slow_bf16(args.device, "give training.bf16=false")
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.reference)
    with args.main_process_first(local=False, desc="preparing the data"):
        data = load_data(config.data, tokenizer, [stage.section.sequence_length for stage in plan])
        fits = config.fit is not None and (config.swap is not None or swapped_before)
        fit_data = load_data(config.data, tokenizer, _fit_lengths(config)) if fits else None
    warn_of_data(data, args, plan, windows_per_step(args))
    return Inputs(config, output, plan, args, tokenizer, data, fit_data)


def _check_models(config: TrainConfig) -> bool:
    """Checks the configs of a recipe's models, and returns whether the model to train was saved with swaps.

    Raises:
        ConfigError: A model does not exist, or the recipe does not fit the model.
    """
    found = load_config_of(config.model.reference)
    if config.teacher is not None:
        load_config_of(config.teacher)
    _check_length(getattr(found.get_text_config(), "max_position_embeddings", None), config)
    swapped = carrier_of(found) is not None
    learned = config.swap is not None and bool(swaps.resolve(config.swap).traits.learned)
    if config.optimizer.freeze == "all_but_swap" and not learned and not swapped:
        raise ConfigError("optimizer.freeze: the swap has no parameters of its own, so nothing would be trained")
    return swapped


def _plan(config: TrainConfig, swapped_before: bool) -> list[Stage]:
    plan = stages_of(config)
    if swapped_before and config.swap is not None and any(stage.section.ramp is not None for stage in plan):
        raise ConfigError(
            f'stages: "{config.model.reference}" was saved with swaps, and a ramp would change their lambda too: begin '
            "with the model before patching"
        )
    if plan and config.swap is None and not swapped_before:
        plan = control_stages(plan)
        if not plan:
            raise ConfigError("stages: without a swap none of them trains anything: set a swap, or add other stages")
    if swapped_before and config.teacher is None and any(stage.section.loss.needs_teacher for stage in plan):
        raise ConfigError(
            f'teacher: "{config.model.reference}" was saved with swaps; set teacher to the model before patching'
        )
    return plan


def _fit_lengths(config: TrainConfig) -> list[int | None]:
    assert config.fit is not None
    usual = config.data.sequence_length
    return [None if length == usual else length for length in config.fit.sequence_lengths or [usual]]


def _check_length(longest: int | None, config: TrainConfig) -> None:
    lengths = {"data.sequence_length": config.data.sequence_length}
    for index, stage in enumerate(config.stages):
        lengths[f"stages.{index}.sequence_length"] = stage.sequence_length or 0
    if config.fit is not None:
        lengths["fit.sequence_lengths"] = max(config.fit.sequence_lengths or [0])
    for key, length in lengths.items():
        if longest is not None and length > longest:
            raise ConfigError(
                f'{key}: must be at most {longest}, the number of positions of "{config.model.reference}", not {length}'
            )


def training_arguments(config: TrainConfig, directory: Path) -> TrainingArguments:
    """Returns the ``TrainingArguments`` of a recipe, with defaults of our own.

    By default a run takes one epoch, evaluates at the start and after each quarter, saves a checkpoint whenever it
    evaluates (or every ``save_steps``), ends with the best checkpoint, and reports to no tracking service. It uses the
    CPU if there is no accelerator. A process uses one accelerator.

    Args:
        config: The recipe.
        directory: The directory of the checkpoints.

    Raises:
        ConfigError: The values contradict each other, or do not fit this machine.
    """
    chosen = config.training
    ramped = any(stage.ramp is not None for stage in config.stages)
    strategy, interval = chosen.get("eval_strategy", "steps"), chosen.get("eval_steps", 0.25)
    saving = "steps" if "save_steps" in chosen else strategy
    defaults = {
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "logging_steps": 10,
        "eval_strategy": strategy,
        "eval_steps": interval,
        "eval_on_start": strategy != "no",
        "save_strategy": saving,
        "save_steps": interval,
        "save_total_limit": 1,
        "load_best_model_at_end": strategy != "no" and not ramped,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": not torch.accelerator.is_available(),
    }
    fixed = {"output_dir": str(directory), "remove_unused_columns": False, "label_names": ["labels"]}
    try:
        args = TrainingArguments(**(defaults | chosen | fixed))
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise ConfigError(f"training: {error}") from None
    if args.n_gpu > 1:
        args._n_gpu = 1  # Trainer would use DataParallel; several accelerators need `accelerate launch`
    absent = set(args.report_to or ()) - set(get_available_reporting_integrations()) - {"flyte"}
    if absent:
        raise ConfigError(f"training.report_to: {', '.join(sorted(absent))} is not installed here (pip install it)")
    return args
