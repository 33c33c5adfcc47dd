"""Run several stages in one training run, with one optimizer and one log; a run can be resumed in any stage."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_utils import SchedulerType

import attnswap
from attnswap.distributed import rank_and_world_size
from attnswap.errors import ConfigError
from attnswap.surgery.body import base_of
from attnswap.surgery.entry import is_patched
from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.patched import slots_of, stacks_of
from attnswap.training.config import TrainConfig
from attnswap.training.distill import Distillation, check_observable
from attnswap.training.loss import chunked_loss
from attnswap.training.ramp import ramp_at
from attnswap.training.sections import StageSection


class Stage:
    """A stage, and which steps of the run it takes.

    Args:
        section: The stage's section of the recipe.
        first: Number of steps before the stage.
        steps: Number of steps of the stage.
        index: Index of the stage in the recipe. A control without some of the stages keeps the indices of the others.
    """

    def __init__(self, section: StageSection, first: int, steps: int, index: int) -> None:
        self.section, self.first, self.steps, self.index = section, first, steps, index


def plan_stages(sections: list[StageSection], max_steps: int) -> list[Stage]:
    """Divides the steps of a run among its stages, at least one step for each.

    Raises:
        ConfigError: There are fewer steps than stages.
    """
    if max_steps < len(sections):
        raise ConfigError(f"training.max_steps: {max_steps} steps are too few for {len(sections)} stages")
    total = sum(section.share for section in sections)
    ends = [round(max_steps * part / total) for part in itertools.accumulate(section.share for section in sections)]
    planned, first = [], 0
    for index, (section, end) in enumerate(zip(sections, ends, strict=True)):
        last = max_steps - (len(sections) - index - 1)
        end = min(max(end, first + 1), last)
        planned.append(Stage(section, first, end - first, index))
        first = end
    return planned


def stages_of(config: TrainConfig) -> list[Stage]:
    """Returns the stages of a recipe; an empty list for a recipe without stages."""
    return plan_stages(config.stages, config.training["max_steps"]) if config.stages else []


def control_stages(stages: list[Stage]) -> list[Stage]:
    """Returns the stages of the control: those that train an unpatched model too. There may be none."""
    kept, first = [], 0
    for stage in stages:
        if stage.section.loss.uses_logits and stage.section.train != "swap":
            kept.append(Stage(stage.section, first, stage.steps, stage.index))
            first += stage.steps
    return kept


class Stages(TrainerCallback):
    """Sets the loss, lambda and the trained parameters of each stage.

    Pass it as one of the trainer's ``callbacks``, since it must be there when the trainer prepares the model. Works
    with ``transformers.Trainer`` and its subclasses. Only :class:`attnswap.training.SwapTrainer` gives stages their own
    learning rates and window lengths; with other trainers a stage that has them is refused.

    Args:
        stages: See :func:`plan_stages`.
        distillation: Computes the losses of the stages.

    Attributes:
        staged_trainer: Whether the trainer gives stages their own learning rates and windows.
        installed: Whether the model computes the loss of the stages.
    """

    def __init__(self, stages: list[Stage], distillation: Distillation) -> None:
        self.stages, self.distillation = stages, distillation
        self._current: Stage | None = None
        self._installed = ExitStack()
        self._frozen: list[torch.nn.Parameter] = []
        self._zeroed: list[torch.nn.Parameter] = []
        self._hooks: list[Any] = []
        self._saw_init = False
        self.installed = False
        self.staged_trainer = False

    def at(self, step: int) -> Stage:
        """Returns the stage of a step, counted from 0."""
        return next((s for s in self.stages if step < s.first + s.steps), self.stages[-1])

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Replaces the model's loss."""
        self._install(base_of(kwargs["model"]))
        self._saw_init = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the trainer can run all stages, and replaces the model's loss if that was undone.

        Raises:
            ConfigError: The callback was added after the trainer was created, or a stage needs what the trainer cannot
                do.
        """
        if not self._saw_init:
            raise ConfigError("pass Stages to the trainer as callbacks=[...]; it cannot be added to a trainer later")
        model: PreTrainedModel = base_of(kwargs["model"])
        planned = sum(stage.steps for stage in self.stages)
        if state.max_steps != planned:
            raise ConfigError(
                f"stages: planned for {planned} steps, but the trainer takes {state.max_steps}: call "
                "plan_stages(..., max_steps) with the trainer's max_steps"
            )
        sections = [stage.section for stage in self.stages]
        if args.load_best_model_at_end and any(section.ramp is not None for section in sections):
            raise ConfigError("load_best_model_at_end: set it to false, since the best loss may be at a lambda below 1")
        for section in sections:
            parameters_to_freeze(model, section)
            check_observable(model, section.loss)
            if not self.staged_trainer and (section.learning_rate is not None or section.sequence_length is not None):
                raise ConfigError(
                    f'stages: "{section.name}" has its own learning_rate or sequence_length, which this trainer '
                    "ignores: use attnswap.training.SwapTrainer(..., stages=plan, windows=[...])"
                )
        if not self.installed:  # this is the second call of train()
            self._current = None
            self._install(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts a stage at its first step, and sets lambda."""
        if 0 < state.max_steps <= state.global_step:  # resumed after the last step
            return
        model: PreTrainedModel = base_of(kwargs["model"])
        stage = self.at(state.global_step)
        if stage is not self._current:
            self._start(stage, model)
        ramp = stage.section.ramp
        if ramp is not None and is_patched(model):
            done = state.global_step + 1 - stage.first
            attnswap.set_ramp(model, ramp_at(ramp, done / max(1.0, ramp.over * stage.steps), model))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Removes gradients that were set to 0: momentum and weight decay would still change their parameters."""
        for parameter in self._zeroed:
            parameter.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs at the end of a stage, so that no log entry is a mean over two stages."""
        if any(state.global_step == stage.first + stage.steps for stage in self.stages):
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the parts of the loss, the stage and lambda to a log entry of training."""
        if logs is None or "loss" not in logs or self._current is None:
            return
        added: dict[str, Any] = {**self.distillation.means(), "stage": self._current.section.name}
        ramp = mean_lambda(base_of(kwargs["model"]))
        added |= {} if ramp is None else {"lambda": ramp}
        logs.update(added)
        state.log_history[-1].update(added)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Undoes all changes of the model except the trained weights."""
        self.close()

    def close(self) -> None:
        """Restores the model's loss and ``requires_grad`` of its parameters. Call it also if training raises."""
        self._unfreeze()
        self._installed.close()
        self.installed = False

    def _install(self, model: PreTrainedModel) -> None:
        self._installed.enter_context(chunked_loss(model, objective=self.distillation))
        self.installed = True

    def _start(self, stage: Stage, model: PreTrainedModel) -> None:
        self._current = stage
        self.distillation.loss = stage.section.loss
        self._unfreeze()
        untrained = parameters_to_freeze(model, stage.section)
        if rank_and_world_size(model)[1] > 1:
            # DDP waits for the gradient of every parameter that required one when it wrapped the model.
            self._zeroed = untrained
            self._hooks = [parameter.register_hook(torch.zeros_like) for parameter in untrained]
            return
        self._frozen = untrained
        for parameter in untrained:
            parameter.requires_grad_(False)

    def _unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        self._frozen, self._zeroed, self._hooks = [], [], []


def parameters_to_freeze(model: PreTrainedModel, section: StageSection) -> list[torch.nn.Parameter]:
    """Returns the trainable parameters of a model that a stage does not train.

    Raises:
        ConfigError: The stage would train nothing.
    """
    if section.train == "all":
        return []
    chosen = {id(p) for p in swap_parameters(model).values()}
    if section.train == "attention":
        modules = (module for stack in stacks_of(model) for _, module in stack.modules.values())
        chosen |= {id(p) for module in modules for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    untrained = [p for p in trainable if id(p) not in chosen]
    if len(untrained) == len(trainable):
        raise ConfigError(
            f'stages: "{section.name}" has nothing to train: the model has no trainable parameters of the kind that '
            f'"train: {section.train}" names'
        )
    return untrained


def mean_lambda(model: PreTrainedModel) -> float | None:
    """Returns the mean lambda over the slots of a model, or None for an unpatched model."""
    ramps = [slot.ramp for _, _, _, slot in slots_of(model)]
    means = [sum(ramp) / len(ramp) if isinstance(ramp, tuple) else ramp for ramp in ramps]
    return sum(means) / len(means) if means else None


class StagedWindows(Sampler[int]):
    """Draws windows stage by stage, from the part of the data set that has the stage's windows.

    Args:
        sizes: Number of windows in the data set for each stage, in order.
        draws: Number of windows that each stage draws. If a stage has fewer, they are repeated in another order.
        seeds: Seed of the order of each stage.
    """

    def __init__(self, sizes: list[int], draws: list[int], seeds: list[int]) -> None:
        self.sizes, self.draws, self.seeds = sizes, draws, seeds

    def __len__(self) -> int:
        return sum(self.draws)

    def __iter__(self) -> Iterator[int]:
        offsets = [0, *itertools.accumulate(self.sizes)]
        for stage, (size, wanted, seed) in enumerate(zip(self.sizes, self.draws, self.seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            while wanted > 0:
                order = torch.randperm(size, generator=generator)[:wanted]
                wanted -= len(order)
                yield from (offsets[stage] + order).tolist()


def staged_schedule(optimizer: Optimizer, stages: list[Stage], args: TrainingArguments) -> LambdaLR:
    """Returns a learning rate schedule in which each stage has its own warmup and decay.

    Args:
        optimizer: The optimizer, with the learning rates of the run.
        stages: The stages.
        args: The arguments of the run. A value of ``warmup_steps`` below 1 is a share of each stage.

    Raises:
        ConfigError: The type of the schedule depends on losses, so that it cannot be computed beforehand.
    """
    factors = []
    for stage in stages:
        warmup = args.warmup_steps
        warmup = round(warmup * stage.steps) if warmup < 1 else min(int(warmup), stage.steps // 2)
        peak = args.learning_rate if stage.section.learning_rate is None else stage.section.learning_rate
        scale = peak / args.learning_rate if args.learning_rate else 1.0
        # Creating a schedule sets the rates of its optimizer, so each stage gets a dummy one.
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak or 1.0)
        options: Any = args.lr_scheduler_kwargs or None
        made = get_scheduler(args.lr_scheduler_type, dummy, warmup, stage.steps, scheduler_specific_kwargs=options)
        if not isinstance(made, LambdaLR):
            raise ConfigError(
                f'training.lr_scheduler_type: "{SchedulerType(args.lr_scheduler_type).value}" depends on the losses '
                "of the run, which does not work with stages: use linear, cosine, constant or another fixed schedule"
            )
        factors.append((stage, made.lr_lambdas[0], scale))

    def factor(step: int) -> float:
        stage, shape, scale = next(((s, f, x) for s, f, x in factors if step < s.first + s.steps), factors[-1])
        return scale * float(shape(step - stage.first))

    return LambdaLR(optimizer, factor)
