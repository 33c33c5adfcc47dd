"""A whole training run: load, patch, train, save."""

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
from attnswap.training.movement import Moved, as_json, start_from
from attnswap.training.packing import IGNORED, check_separation
from attnswap.training.protect import protect
from attnswap.training.rest import at_rest
from attnswap.training.signals import StopOnSignal
from attnswap.training.stages import Stage, Stages, left_alone
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
    inputs = gather_inputs(config)  # all that can be refused without the model, which is slow to load
    config, output, plan, args = inputs.config, inputs.output, inputs.plan, inputs.args
    data, shown = inputs.data, inputs.shown
    with _whole_models(args):
        model = load_model(config.model.reference, dtype=getattr(torch, config.model.dtype))
    use_cache = model.config.use_cache
    _patch(model, config, plan, args.seed)
    fitted = output.partial / FITTED
    known = Path(args.resume_from_checkpoint).absolute().with_name(FITTED) if args.resume_from_checkpoint else None
    fit_seconds = _start_swaps(model, inputs, known)
    if config.optimizer.freeze == "all_but_swap":
        freeze_all_but_swap(model)
    adapters = add_lora(model, config.lora) if config.lora else None

    trainable = _count_trainable(model, plan)
    if args.process_index == 0:
        output.prepare(config, args.resume_from_checkpoint)
    steps = StepLog(output.partial / "steps.jsonl")
    if fit_seconds is not None and args.process_index == 0:
        steps.note({"fit_runtime": fit_seconds})
    with learning(model, config, plan) as switch:
        trainer = _trainer(model, inputs, [*switch, steps])
        if shown is not None and args.process_index == 0 and not (known == fitted and fitted.is_file()):
            trainer.movement.save(fitted)
        protection = protect(trainer)
        try:
            trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        finally:
            protection.stop.restore()
        _raise_if_stopped(protection.stop, args)
        after = _held_out_after(trainer)
    movement = trainer.movement.measure(model)
    if adapters is not None:
        adapters.merge_and_unload()
    if any(stage.section.ramp is not None for stage in plan) and is_patched(model):
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
    late = all_reduce_max(int(protection.stop.received or 0), args.device)
    return TrainResult(output.final, summary, movement, Signals(late) if late else None)


@contextmanager
def _whole_models(args: TrainingArguments) -> Iterator[None]:
    """Has each process load the whole model, which is patched before Trainer shards it."""
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
    """Swaps what a recipe swaps, at the start of its ramp, in a model that must keep packed documents apart."""
    set_seed(seed)  # gates may start from noise: the same in every process and on resuming
    if config.swap is not None:
        ramp = next((s.section.ramp.start for s in plan if s.section.ramp is not None), config.ramp)
        attnswap.patch(model, config.swap, part=config.part, layers=config.layers, heads=config.heads, ramp=ramp)
    if config.data.pack:
        check_separation(model)


def _start_swaps(model: PreTrainedModel, inputs: Inputs, known: Path | None) -> float | None:
    """Gives swaps that are fitted the start that is known, or fits them and returns the seconds it took."""
    if inputs.shown is None:
        return None
    if known is not None and known.is_file():
        start_from(model, known)
        return None
    started = time.monotonic()
    fit_swaps(model, inputs.config, inputs.shown, inputs.args)
    return time.monotonic() - started


def _count_trainable(model: PreTrainedModel, plan: list[Stage]) -> int:
    """Counts the parameters that are trained, and refuses a recipe or a stage that trains none."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not trainable:
        raise ConfigError("nothing would be trained: every weight is frozen, and the swap has no parameters of its own")
    for stage in plan:
        left_alone(model, stage.section)  # refuses one that trains nothing, which else would be seen when it begins
    return trainable


@contextmanager
def learning(model: PreTrainedModel, config: TrainConfig, plan: list[Stage]) -> Iterator[list[TrainerCallback]]:
    """Gives a model the loss of a recipe, and yields the callbacks that go with it."""
    if not plan:
        with chunked_loss(model):
            yield []
        return
    teacher = None
    if any(stage.section.loss.taught for stage in plan):
        if config.teacher is not None:
            teacher = frozen_teacher(load_model(config.teacher, dtype=torch.float32), matrix_dtype(config))
        else:
            teacher = teacher_of(model, dtype=matrix_dtype(config))
    switch = Stages(plan, Distillation(teacher, plan[0].section.loss))
    try:
        yield [switch]
    finally:
        switch.close()


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
        broadcast(parameter.data, args.device)


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
        rest=at_rest(config, plan, inputs.args),
    )


def _raise_if_stopped(stop: StopOnSignal, args: TrainingArguments) -> None:
    """Raises StoppedError, which says how to go on, where a signal ended training before its last step."""
    if stop.step is not None and stop.received is not None:
        raise StoppedError(
            f"stopped by {stop.received.name} after step {stop.step}; "
            + (
                "its checkpoint cannot be resumed (training.save_only_model), so start anew with overwrite=true"
                if args.save_only_model
                else "go on with training.resume_from_checkpoint=latest"
            )
        )


def _held_out_after(trainer: SwapTrainer) -> dict[str, float] | None:
    """Returns the held-out metrics of the weights as they are now."""
    if trainer.args.eval_strategy == "no":
        return None
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    saved = trainer.loaded_step or trainer.state.global_step
    known = [entry for entry in entries if entry["step"] == saved and saved]
    return known[-1] if known else trainer.evaluate()
