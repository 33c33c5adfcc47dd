"""A whole training run: load, patch, train, save."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.integrations import (
    get_available_reporting_integrations,
    is_deepspeed_zero3_enabled,
)
from transformers.utils.generic import strtobool

import attnswap
from attnswap.errors import ConfigError, StoppedError
from attnswap.loading import load_model, load_tokenizer
from attnswap.processes import largest, spread, warn_of_bf16
from attnswap.surgery.attach import spec_of
from attnswap.training.config import TrainConfig
from attnswap.training.data import Data, load_data
from attnswap.training.distill import Distillation
from attnswap.training.durable import latest_checkpoint
from attnswap.training.fitting import fit
from attnswap.training.lora import add_lora
from attnswap.training.loss import chunked_loss
from attnswap.training.movement import Moved, as_json, start_from
from attnswap.training.output import Output
from attnswap.training.packing import IGNORED, check_separation
from attnswap.training.protect import protect
from attnswap.training.rest import at_rest
from attnswap.training.stages import Stage, Stages, left_alone, plan_of, without_swaps
from attnswap.training.summary import summarise
from attnswap.training.teacher import frozen_teacher, matrix_dtype, teacher_of
from attnswap.training.trainer import StepLog, SwapTrainer

FITTED = "fitted.safetensors"
"""In a result, and in what a run that is cut off leaves: the start of the swap's parameters that was fitted."""


@dataclass(frozen=True)
class TrainResult:
    """What a run gives back.

    Attributes:
        output_dir: The saved model, tokenizer and reports.
        summary: What ``summary.json`` holds.
        movement: How far each swap parameter moved, by name.
        signal: A signal that asked for the end when the last step was done, so that this run is whole; or None.
    """

    output_dir: Path
    summary: dict[str, Any]
    movement: dict[str, Moved]
    signal: Signals | None = None


def train(config: TrainConfig) -> TrainResult:
    """Runs a recipe: loads the model, patches it, trains it, and saves the best weights seen.

    Under ``accelerate launch`` every process calls this; the first one writes.

    Args:
        config: See :func:`attnswap.training.config.load_config`.

    Returns:
        Where the result is, and what was measured.

    Raises:
        ConfigError: The recipe asks for what does not exist or cannot be, or its output directory is taken.
        UnsupportedModelError: The model cannot be patched, or its loss not be computed in chunks.
        NumericsError: The loss or a gradient was not finite for three steps in a row.
        StoppedError: A signal asked for the end; a checkpoint was saved.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    output = Output(Path(config.output_dir), overwrite=config.overwrite)
    if config.training.get("resume_from_checkpoint") in ("latest", True):
        latest = latest_checkpoint(output.partial)
        resumed = {**config.training, "resume_from_checkpoint": None if latest is None else str(latest)}
        config = replace(config, training=resumed)
    output.check(config.training.get("resume_from_checkpoint"))
    model = load_model(config.model.reference, dtype=getattr(torch, config.model.dtype))
    swapped_before = spec_of(model) is not None
    plan = plan_of(config)
    if swapped_before and config.swap is not None and any(stage.section.ramp is not None for stage in plan):
        raise ConfigError(
            f'stages: a ramp would move the swaps that "{config.model.reference}" was saved with, too: begin with the '
            "model it was before"
        )
    if plan and config.swap is None and not swapped_before:
        plan = without_swaps(plan)
        if not plan:
            raise ConfigError("stages: without a swap nothing is left to train, so these stages have no control")
    steps_of_plan = {"max_steps": sum(stage.steps for stage in plan)} if plan else {}
    args = training_arguments(replace(config, training={**config.training, **steps_of_plan}), output.partial)
    if args.bf16:
        warn_of_bf16(args.device, "give training.bf16=false")
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.reference)
    _check_length(model, config)
    with args.main_process_first(local=False, desc="preparing the data"):
        data = load_data(config.data, tokenizer, [stage.section.sequence_length for stage in plan])
        fits = config.fit is not None and (config.swap is not None or swapped_before)
        shown = load_data(config.data, tokenizer, _lengths_to_fit(config)) if fits else None
    use_cache = model.config.use_cache
    set_seed(args.seed)  # gates may start from noise: the same in every process and on resuming
    if config.swap is not None:
        ramp = next((s.section.ramp.start for s in plan if s.section.ramp is not None), config.ramp)
        attnswap.patch(model, config.swap, part=config.part, layers=config.layers, heads=config.heads, ramp=ramp)
    if config.data.pack:
        check_separation(model)
    fitted, fit_seconds = output.partial / FITTED, None
    known = Path(args.resume_from_checkpoint).absolute().with_name(FITTED) if args.resume_from_checkpoint else None
    if shown is not None and known is not None and known.is_file():
        start_from(model, known)
    elif shown is not None:
        started = time.monotonic()
        fit_swaps(model, config, shown, args)
        fit_seconds = time.monotonic() - started
    if config.optimizer.freeze == "all_but_swap":
        freeze_all_but_swap(model)
    adapters = add_lora(model, config.lora) if config.lora else None

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise ConfigError("nothing would be trained: every weight is frozen, and the swap has no parameters of its own")
    for stage in plan:
        left_alone(model, stage.section)  # refuses one that trains nothing, which else would be seen when it begins
    if args.process_index == 0:
        output.prepare(config, args.resume_from_checkpoint)
    steps = StepLog(output.partial / "steps.jsonl")
    if fit_seconds is not None and args.process_index == 0:
        steps.note({"fit_runtime": fit_seconds})
    with learning(model, config, plan, swapped_before=swapped_before) as switch:
        trainer = SwapTrainer(
            model=model,
            args=args,
            data_collator=default_data_collator,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
            callbacks=[*switch, steps],
            swap_lr_multiplier=config.optimizer.swap_lr_multiplier,
            stages=plan,
            windows=data.sizes if plan else (),
            rest=at_rest(config, plan, args),
        )
        if shown is not None and args.process_index == 0 and not (known == fitted and fitted.is_file()):
            trainer.movement.save(fitted)
        protection = protect(trainer)
        try:
            trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        finally:
            protection.stop.restore()
        if protection.stop.step is not None and protection.stop.received is not None:
            raise StoppedError(
                f"stopped by {protection.stop.received.name} after step {protection.stop.step}; "
                + (
                    "its checkpoint cannot be resumed (training.save_only_model), so start anew with overwrite=true"
                    if args.save_only_model
                    else "go on with training.resume_from_checkpoint=latest"
                )
            )
        after = _held_out_after(trainer)
    movement = trainer.movement.measure(model)
    if adapters is not None:
        adapters.merge_and_unload()
    if any(stage.section.ramp is not None for stage in plan) and spec_of(model) is not None:
        attnswap.set_ramp(model, 1.0)  # for all heads, which may have gone there one by one
    model.config.use_cache = use_cache  # Trainer turns it off, and the saved model should generate as before
    summary = summarise(
        config,
        trainer,
        trained.metrics,
        after,
        movement,
        steps,
        trainable,
        protection.finite.skipped,
        data.description,
        0 if shown is None else sum(len(row["input_ids"]) for row in _looked_at(shown, config)),
    )
    trainer.save_model(str(output.partial))
    if trainer.is_world_process_zero():
        output.publish(config, trainer.state.log_history, as_json(movement), summary)
    trainer.accelerator.wait_for_everyone()
    late = largest(int(protection.stop.received or 0), args.device)
    return TrainResult(output.final, summary, movement, Signals(late) if late else None)


@contextmanager
def learning(
    model: PreTrainedModel, config: TrainConfig, plan: list[Stage], *, swapped_before: bool
) -> Iterator[list[TrainerCallback]]:
    """Gives a model the loss of a recipe, and yields the callbacks that go with it.

    Raises:
        ConfigError: The model was saved with swaps, so that it cannot tell what it was before.
    """
    if not plan:
        with chunked_loss(model):
            yield []
        return
    teacher = None
    if any(stage.section.loss.taught for stage in plan):
        if config.teacher is not None:
            teacher = frozen_teacher(load_model(config.teacher, dtype=torch.float32), matrix_dtype(config))
        elif swapped_before:
            raise ConfigError(
                f'teacher: "{config.model.reference}" was saved with swaps; name the model it was before to learn from'
            )
        else:
            teacher = teacher_of(model, dtype=matrix_dtype(config))
    switch = Stages(plan, Distillation(teacher, plan[0].section.loss))
    try:
        yield [switch]
    finally:
        switch.close()


def _lengths_to_fit(config: TrainConfig) -> list[int | None]:
    assert config.fit is not None
    usual = config.data.sequence_length
    return [None if length == usual else length for length in config.fit.sequence_lengths or [usual]]


def fit_swaps(model: PreTrainedModel, config: TrainConfig, data: Data, args: TrainingArguments) -> None:
    """Fits a patched model as a recipe's ``fit`` says, on windows of its training text, in the first process.

    Raises:
        ConfigError: DeepSpeed has split the weights, so that no process can run the model alone.
    """
    if is_deepspeed_zero3_enabled():
        raise ConfigError("fit: under ZeRO-3 no process has the whole model; fit and train by DDP or FSDP")
    if not strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):  # which shards it before it is moved
        model.to(device=args.device)  # type: ignore[call-arg]
    if args.process_index == 0:
        rows, names = _looked_at(data, config), ("input_ids", "position_ids")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(config.training.get("bf16"))):
            fit(model, ({name: row[name][None].to(model.device) for name in names} for row in rows))
    for parameter in attnswap.swap_parameters(model).values():
        spread(parameter.data, args.device)


def _looked_at(data: Data, config: TrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yields windows from all over each part of the data until they hold the tokens to fit to, as many of each part."""
    assert config.fit is not None
    generator = torch.Generator().manual_seed(0)
    first = 0
    for size in data.sizes:
        wanted = config.fit.tokens / len(data.sizes)
        for index in torch.randperm(size, generator=generator).tolist():
            row = data.train[first + index]
            text = int((row["labels"] != IGNORED).nonzero().max()) + 1  # what follows is padding
            yield {name: values[:text] for name, values in row.items()}
            wanted -= text
            if wanted <= 0:
                break
        first += size


def training_arguments(config: TrainConfig, directory: Path) -> TrainingArguments:
    """Builds ``TrainingArguments``: the recipe's own, and defaults that keep the best checkpoint.

    Unless the recipe says otherwise a run goes once through the data, evaluates at the start and at each quarter,
    saves then too, or every ``save_steps`` where that is given, keeps the best, reports to nobody, and uses the CPU
    where there is no accelerator. A process uses one accelerator.

    Args:
        config: The recipe.
        directory: Where checkpoints go.

    Raises:
        ConfigError: The values do not fit together or the machine.
    """
    chosen = config.training
    ramped = any(stage.ramp is not None for stage in config.stages)
    strategy, every = chosen.get("eval_strategy", "steps"), chosen.get("eval_steps", 0.25)
    saving = "steps" if "save_steps" in chosen else strategy
    defaults = {
        "num_train_epochs": 1.0,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "logging_steps": 10,
        "eval_strategy": strategy,
        "eval_steps": every,
        "eval_on_start": strategy != "no",
        "save_strategy": saving,
        "save_steps": every,
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
        args._n_gpu = 1  # Trainer would run replicas in threads; `accelerate launch` is how several share a run
    absent = set(args.report_to or ()) - set(get_available_reporting_integrations()) - {"flyte"}
    if absent:
        raise ConfigError(f"training.report_to: {', '.join(sorted(absent))} is not installed here (pip install it)")
    return args


def freeze_all_but_swap(model: PreTrainedModel) -> None:
    """Leaves only the swap's parameters trainable.

    Raises:
        ConfigError: There is no swap, or it has no parameters.
    """
    own = attnswap.swap_parameters(model)
    if not own:
        raise ConfigError("optimizer.freeze: the swap has no parameters of its own, so nothing would be trained")
    model.requires_grad_(False)
    for parameter in own.values():
        parameter.requires_grad_(True)


def _check_length(model: PreTrainedModel, config: TrainConfig) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.sequence_length": config.data.sequence_length}
    for index, stage in enumerate(config.stages):
        lengths[f"stages.{index}.sequence_length"] = stage.sequence_length or 0
    if config.fit is not None:
        lengths["fit.sequence_lengths"] = max(config.fit.sequence_lengths or [0])
    for key, length in lengths.items():
        if longest is not None and length > longest:
            raise ConfigError(
                f'{key}: {length} tokens are more than the {longest} positions of "{config.model.reference}"'
            )


def _held_out_after(trainer: SwapTrainer) -> dict[str, float] | None:
    """Returns the held-out metrics of the weights as they are now."""
    if trainer.args.eval_strategy == "no":
        return None
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    saved = trainer.loaded_step or trainer.state.global_step
    known = [entry for entry in entries if entry["step"] == saved and saved]
    return known[-1] if known else trainer.evaluate()
