"""A training run from recipe to result: load, patch, train, save."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.utils.generic import strtobool

import attnswap
from attnswap.distributed import all_reduce_max, broadcast
from attnswap.errors import ConfigError, StoppedError
from attnswap.loading import load_model
from attnswap.surgery.entry import is_patched
from attnswap.training.config import TrainConfig
from attnswap.training.data import Data
from attnswap.training.distill import Distillation
from attnswap.training.fitting import fit
from attnswap.training.inputs import Inputs, gather_inputs
from attnswap.training.lora import add_lora
from attnswap.training.loss import chunked_loss
from attnswap.training.movement import Moved, as_json, load_start
from attnswap.training.packing import IGNORED, check_separation
from attnswap.training.protect import protect
from attnswap.training.signals import StopOnSignal
from attnswap.training.stages import Stage, Stages, parameters_to_freeze
from attnswap.training.summary import summarise
from attnswap.training.teacher import frozen_teacher, matrix_dtype, teacher_of
from attnswap.training.trainer import StepLog, SwapTrainer
from attnswap.training.zero_gradient import zero_gradient_steps

FITTED = "fitted.safetensors"
"""File of the fitted initial values of the swap's parameters, in a result and in an unfinished run."""


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        output_dir: Directory of the saved model, tokenizer and reports.
        summary: Content of ``summary.json``.
        movement: How far each swap parameter moved, by name.
        signal: A signal that was received after the last step, when the run was already complete; or None.
    """

    output_dir: Path
    summary: dict[str, Any]
    movement: dict[str, Moved]
    signal: Signals | None = None


def train(config: TrainConfig) -> TrainResult:
    """Runs a recipe: loads the model, patches it, trains it, and saves it.

    With ``accelerate launch`` every process calls this function, and the process of rank 0 writes.

    Args:
        config: See :func:`attnswap.training.config.load_config`.

    Returns:
        The result.

    Raises:
        ConfigError: The recipe names something that does not exist, its values contradict each other, or its output
            directory is not empty.
        UnsupportedModelError: The model cannot be patched, or its loss cannot be computed in chunks.
        NumericsError: The loss or a gradient was not finite for three steps in a row.
        StoppedError: A signal such as SIGTERM was received. A checkpoint was saved.
    """
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    inputs = gather_inputs(config)  # finds all errors that can be found without loading the model
    config, output, plan, args = inputs.config, inputs.output, inputs.plan, inputs.args
    data, fit_data = inputs.data, inputs.fit_data
    with _loading_unsharded(args):
        model = load_model(config.model.reference, dtype=getattr(torch, config.model.dtype))
    use_cache = model.config.use_cache
    _patch(model, config, plan, args.seed)
    fitted = output.partial / FITTED
    earlier_fit = (
        Path(args.resume_from_checkpoint).absolute().with_name(FITTED) if args.resume_from_checkpoint else None
    )
    fit_seconds = _fit_or_load(model, inputs, earlier_fit)
    if config.optimizer.freeze == "all_but_swap":
        freeze_all_but_swap(model)
    adapters = add_lora(model, config.lora) if config.lora else None

    trainable = _count_trainable(model, plan)
    if args.process_index == 0:
        output.prepare(config, args.resume_from_checkpoint)
    steps = StepLog(output.partial / "steps.jsonl")
    if fit_seconds is not None and args.process_index == 0:
        steps.note({"fit_runtime": fit_seconds})
    with recipe_loss(model, config, plan) as callbacks:
        trainer = _trainer(model, inputs, [*callbacks, steps])
        if fit_data is not None and args.process_index == 0 and not (earlier_fit == fitted and fitted.is_file()):
            trainer.movement.save(fitted)
        protection = protect(trainer)
        try:
            trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        finally:
            protection.stop.restore()
        _raise_if_stopped(protection.stop, args)
        held_out = _final_held_out(trainer)
    movement = trainer.movement.measure(model)
    if adapters is not None:
        adapters.merge_and_unload()
    if any(stage.section.ramp is not None for stage in plan) and is_patched(model):
        attnswap.set_ramp(model, 1.0)  # one number in the saved config in place of one per head
    model.config.use_cache = use_cache  # Trainer sets it to false, and the saved model should generate with a cache
    summary = summarise(
        config,
        trainer,
        trained.metrics,
        held_out,
        movement,
        steps,
        trainable,
        protection.finite.skipped,
        data.description,
        0 if fit_data is None else sum(len(row["input_ids"]) for row in _fit_windows(fit_data, config)),
    )
    trainer.save_model(str(output.partial))
    if trainer.is_world_process_zero():
        output.publish(config, trainer.state.log_history, as_json(movement), summary)
    trainer.accelerator.wait_for_everyone()
    number = all_reduce_max(int(protection.stop.received or 0), args.device)
    return TrainResult(output.final, summary, movement, Signals(number) if number else None)


@contextmanager
def _loading_unsharded(args: TrainingArguments) -> Iterator[None]:
    """Makes each process load the full model, which must be patched before Trainer shards it."""
    efficient = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient
        if args.deepspeed_plugin is not None:
            args.deepspeed_plugin.set_deepspeed_weakref()


def _patch(model: PreTrainedModel, config: TrainConfig, plan: list[Stage], seed: int) -> None:
    """Patches the model of a recipe at its first lambda, and checks that it keeps packed documents apart."""
    set_seed(seed)  # gates may be initialised with noise, which must be the same in all processes and on resuming
    if config.swap is not None:
        ramp = next((s.section.ramp.start for s in plan if s.section.ramp is not None), config.ramp)
        attnswap.patch(model, config.swap, part=config.part, layers=config.layers, heads=config.heads, ramp=ramp)
    if config.data.pack:
        check_separation(model)


def _fit_or_load(model: PreTrainedModel, inputs: Inputs, earlier_fit: Path | None) -> float | None:
    """Fits the swaps and returns the seconds it took; loads the fit of a run that is resumed and returns None."""
    if inputs.fit_data is None:
        return None
    if earlier_fit is not None and earlier_fit.is_file():
        load_start(model, earlier_fit)
        return None
    started = time.monotonic()
    fit_swaps(model, inputs.config, inputs.fit_data, inputs.args)
    return time.monotonic() - started


def _count_trainable(model: PreTrainedModel, plan: list[Stage]) -> int:
    """Returns the number of trainable parameters.

    Raises:
        ConfigError: The recipe or one of its stages trains no parameters.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise ConfigError("nothing would be trained: every weight is frozen, and the swap has no parameters of its own")
    for stage in plan:
        parameters_to_freeze(model, stage.section)  # raises ConfigError for a stage that trains nothing
    return trainable


@contextmanager
def recipe_loss(model: PreTrainedModel, config: TrainConfig, plan: list[Stage]) -> Iterator[list[TrainerCallback]]:
    """Makes a model compute the loss of a recipe, and yields the callbacks that this needs."""
    if not plan:
        with chunked_loss(model):
            yield []
        return
    teacher = None
    if any(stage.section.loss.needs_teacher for stage in plan):
        if config.teacher is not None:
            teacher = frozen_teacher(load_model(config.teacher, dtype=torch.float32), matrix_dtype(config))
        else:
            teacher = teacher_of(model, dtype=matrix_dtype(config))
    stages = Stages(plan, Distillation(teacher, plan[0].section.loss))
    try:
        yield [stages]
    finally:
        stages.close()


def fit_swaps(model: PreTrainedModel, config: TrainConfig, data: Data, args: TrainingArguments) -> None:
    """Fits the swaps of a model on windows of the training text, in the process of rank 0, and broadcasts the result.

    Raises:
        ConfigError: DeepSpeed shards the weights, so that no process can run the model alone.
    """
    if is_deepspeed_zero3_enabled():
        raise ConfigError("fit: with ZeRO-3 no process has the full model; fit and train with DDP or FSDP")
    if not strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):  # FSDP shards the model before it moves it
        model.to(device=args.device)  # type: ignore[call-arg]
    if args.process_index == 0:
        rows, names = _fit_windows(data, config), ("input_ids", "position_ids")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bool(config.training.get("bf16"))):
            fit(model, ({name: row[name][None].to(model.device) for name in names} for row in rows))
    for parameter in attnswap.swap_parameters(model).values():
        broadcast(parameter.data, args.device)


def _fit_windows(data: Data, config: TrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Yields random windows of the data, with as many tokens of each window length, up to the tokens to fit to."""
    assert config.fit is not None
    generator = torch.Generator().manual_seed(0)
    first = 0
    for size in data.sizes:
        wanted = config.fit.tokens / len(data.sizes)
        for index in torch.randperm(size, generator=generator).tolist():
            row = data.train[first + index]
            length = int((row["labels"] != IGNORED).nonzero().max()) + 1  # the rest is padding
            yield {name: values[:length] for name, values in row.items()}
            wanted -= length
            if wanted <= 0:
                break
        first += size


def freeze_all_but_swap(model: PreTrainedModel) -> None:
    """Freezes all parameters but the swap's.

    Raises:
        ConfigError: The model has no swap, or its swaps have no parameters.
    """
    own = attnswap.swap_parameters(model)
    if not own:
        raise ConfigError("optimizer.freeze: the swap has no parameters of its own, so nothing would be trained")
    model.requires_grad_(False)
    for parameter in own.values():
        parameter.requires_grad_(True)


def _trainer(model: PreTrainedModel, inputs: Inputs, callbacks: list[TrainerCallback]) -> SwapTrainer:
    config, plan, data = inputs.config, inputs.plan, inputs.data
    return SwapTrainer(
        model=model,
        args=inputs.args,
        data_collator=default_data_collator,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=inputs.tokenizer,
        callbacks=callbacks,
        swap_lr_multiplier=config.optimizer.swap_lr_multiplier,
        stages=plan,
        windows=data.sizes if plan else (),
        skip_steps=zero_gradient_steps(config, plan, inputs.args),
    )


def _raise_if_stopped(stop: StopOnSignal, args: TrainingArguments) -> None:
    """Raises StoppedError, with the way to resume, if a signal ended training before its last step."""
    if stop.step is not None and stop.received is not None:
        raise StoppedError(
            f"stopped by {stop.received.name} after step {stop.step}; "
            + (
                "its checkpoint cannot be resumed (training.save_only_model): start anew with overwrite=true"
                if args.save_only_model
                else "resume with training.resume_from_checkpoint=latest"
            )
        )


def _final_held_out(trainer: SwapTrainer) -> dict[str, float] | None:
    """Returns the held-out metrics of the final weights, from the log if they are there."""
    if trainer.args.eval_strategy == "no":
        return None
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    saved = trainer.loaded_step or trainer.state.global_step
    known = [entry for entry in entries if entry["step"] == saved and saved]
    return known[-1] if known else trainer.evaluate()
