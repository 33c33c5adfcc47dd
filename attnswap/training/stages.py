"""Several stages in one run of a trainer: one optimizer, one log, and checkpoints to resume from anywhere."""

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
from attnswap.training.distill import Distillation, check_looked_into
from attnswap.training.loss import chunked_loss
from attnswap.training.ramp import ramps
from attnswap.training.sections import StageSection


class Stage:
    """A stage with its place in the run.

    Args:
        section: What it is.
        first: Number of steps before it.
        steps: Its own number of steps.
        index: Its place in the recipe, which the control's stages keep.
    """

    def __init__(self, section: StageSection, first: int, steps: int, index: int) -> None:
        self.section, self.first, self.steps, self.index = section, first, steps, index


def plan_stages(sections: list[StageSection], max_steps: int) -> list[Stage]:
    """Gives each stage its share of a run's steps, at least one.

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


def plan_of(config: TrainConfig) -> list[Stage]:
    """Returns the stages of a recipe, none if it has none."""
    return plan_stages(config.stages, config.training["max_steps"]) if config.stages else []


def without_swaps(stages: list[Stage]) -> list[Stage]:
    """Returns what is left of stages for the control: not those that teach the swaps alone, which may be all."""
    kept, first = [], 0
    for stage in stages:
        if stage.section.loss.of_logits and stage.section.train != "swap":
            kept.append(Stage(stage.section, first, stage.steps, stage.index))
            first += stage.steps
    return kept


class Stages(TrainerCallback):
    """Switches loss, lambda and what is trained as a run goes from stage to stage.

    Give it to the trainer's ``callbacks``, so that it is there when the trainer prepares the model. Works with
    ``transformers.Trainer`` and its subclasses. Learning rates and window lengths of stages are the business of
    :class:`attnswap.training.SwapTrainer`; with another trainer they are refused.

    Args:
        stages: See :func:`plan_stages`.
        distillation: What the losses of the stages are computed by.

    Attributes:
        served: The trainer gives the stages their learning rates and windows.
        installed: The model computes the loss of the stages.
    """

    def __init__(self, stages: list[Stage], distillation: Distillation) -> None:
        self.stages, self.distillation = stages, distillation
        self._current: Stage | None = None
        self._installed = ExitStack()
        self._frozen: list[torch.nn.Parameter] = []
        self._silenced: list[torch.nn.Parameter] = []
        self._hooks: list[Any] = []
        self._made = False
        self.installed = False
        self.served = False

    def at(self, step: int) -> Stage:
        """Returns the stage of the step that follows ``step`` others."""
        return next((s for s in self.stages if step < s.first + s.steps), self.stages[-1])

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Puts the loss into the model."""
        self._install(base_of(kwargs["model"]))
        self._made = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Makes sure that the loss is there, and that every stage can do what it is for.

        Raises:
            ConfigError: The callback was added after the trainer was made, or the stages ask for what it does not do.
        """
        if not self._made:
            raise ConfigError("Stages must be among the trainer's callbacks=[...] when it is made, not added later")
        model: PreTrainedModel = base_of(kwargs["model"])
        planned = sum(stage.steps for stage in self.stages)
        if state.max_steps != planned:
            raise ConfigError(
                f"stages: planned for {planned} steps, and the trainer makes {state.max_steps}, so that lambda and the "
                "last stages would end elsewhere: plan_stages(..., max_steps) takes the trainer's max_steps"
            )
        sections = [stage.section for stage in self.stages]
        if args.load_best_model_at_end and any(section.ramp is not None for section in sections):
            raise ConfigError("load_best_model_at_end: the best loss may be one at a lambda below 1: switch it off")
        for section in sections:
            left_alone(model, section)
            check_looked_into(model, section.loss)
            if not self.served and (section.learning_rate is not None or section.sequence_length is not None):
                raise ConfigError(
                    f'stages: "{section.name}" has a learning rate or windows of its own, which this trainer would not '
                    "give it: take attnswap.training.SwapTrainer(..., stages=plan, windows=[...])"
                )
        if not self.installed:  # trained once already
            self._current = None
            self._install(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enters the stage of the step to come, and moves lambda."""
        if 0 < state.max_steps <= state.global_step:  # resumed at the end
            return
        model: PreTrainedModel = base_of(kwargs["model"])
        stage = self.at(state.global_step)
        if stage is not self._current:
            self._enter(stage, model)
        ramp = stage.section.ramp
        if ramp is not None and is_patched(model):
            done = state.global_step + 1 - stage.first
            attnswap.set_ramp(model, ramps(ramp, done / max(1.0, ramp.over * stage.steps), model))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes gradients of 0 away, which momentum and weight decay would turn into steps."""
        for parameter in self._silenced:
            parameter.grad = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs where a stage ends, so that no entry speaks of two."""
        if any(state.global_step == stage.first + stage.steps for stage in self.stages):
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Adds the parts of the loss and the stage to a training entry."""
        if logs is None or "loss" not in logs or self._current is None:
            return
        added: dict[str, Any] = {**self.distillation.means(), "stage": self._current.section.name}
        ramp = lambda_of(base_of(kwargs["model"]))
        added |= {} if ramp is None else {"lambda": ramp}
        logs.update(added)
        state.log_history[-1].update(added)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the model as it was, but for what it learned."""
        self.close()

    def close(self) -> None:
        """Takes the loss out of the model again and thaws what a stage froze; for runs that end in an error."""
        self._thaw()
        self._installed.close()
        self.installed = False

    def _install(self, model: PreTrainedModel) -> None:
        self._installed.enter_context(chunked_loss(model, objective=self.distillation))
        self.installed = True

    def _enter(self, stage: Stage, model: PreTrainedModel) -> None:
        self._current = stage
        self.distillation.loss = stage.section.loss
        self._thaw()
        rest = left_alone(model, stage.section)
        if rank_and_world_size(model)[1] > 1:
            # DDP waits for the gradient of every parameter that required one when it wrapped the model.
            self._silenced = rest
            self._hooks = [parameter.register_hook(torch.zeros_like) for parameter in rest]
            return
        self._frozen = rest
        for parameter in rest:
            parameter.requires_grad_(False)

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for hook in self._hooks:
            hook.remove()
        self._frozen, self._silenced, self._hooks = [], [], []


def left_alone(model: PreTrainedModel, section: StageSection) -> list[torch.nn.Parameter]:
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
    rest = [p for p in trainable if id(p) not in chosen]
    if len(rest) == len(trainable):
        raise ConfigError(f'stages: "{section.name}" has nothing to train')
    return rest


def lambda_of(model: PreTrainedModel) -> float | None:
    """Returns the mean lambda over the swapped heads of a model, or None if it has no swaps."""
    ramps = [slot.ramp for _, _, _, slot in slots_of(model)]
    means = [sum(ramp) / len(ramp) if isinstance(ramp, tuple) else ramp for ramp in ramps]
    return sum(means) / len(means) if means else None


class StagedWindows(Sampler[int]):
    """Draws windows of each stage's own length, stage after stage.

    Args:
        sizes: How many windows there are for each stage, in the order in which the data set holds them.
        draws: How many each stage takes; where there are fewer, they come again in another order.
        seeds: Of the order of each.
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
    """Returns a schedule in which each stage warms up and decays for itself.

    Args:
        optimizer: Whose groups have the run's learning rates.
        stages: The stages.
        args: The run's; ``warmup_steps`` below 1 are a share of each stage.

    Raises:
        ConfigError: The schedule depends on how the run goes.
    """
    factors = []
    for stage in stages:
        warmup = args.warmup_steps
        warmup = round(warmup * stage.steps) if warmup < 1 else min(int(warmup), stage.steps // 2)
        peak = args.learning_rate if stage.section.learning_rate is None else stage.section.learning_rate
        scale = peak / args.learning_rate if args.learning_rate else 1.0
        # On an optimizer of its own: making a schedule sets the rates of its optimizer.
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak or 1.0)
        options: Any = args.lr_scheduler_kwargs or None
        made = get_scheduler(args.lr_scheduler_type, dummy, warmup, stage.steps, scheduler_specific_kwargs=options)
        if not isinstance(made, LambdaLR):
            raise ConfigError(
                f'training.lr_scheduler_type: "{SchedulerType(args.lr_scheduler_type).value}" looks at the run as it '
                "goes, which stages do not let it: take linear, cosine, constant or another that is known beforehand"
            )
        factors.append((stage, made.lr_lambdas[0], scale))

    def factor(step: int) -> float:
        stage, shape, scale = next(((s, f, x) for s, f, x in factors if step < s.first + s.steps), factors[-1])
        return scale * float(shape(step - stage.first))

    return LambdaLR(optimizer, factor)
