"""Teachers for distillation: the model before patching, or another model."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnswap.errors import ConfigError
from attnswap.evaluation.lm_head import head_logits
from attnswap.modes import evaluating
from attnswap.surgery.body import base_of, body_of
from attnswap.surgery.bypass import bypassed
from attnswap.surgery.entry import is_patched
from attnswap.surgery.parameters import swap_parameters
from attnswap.surgery.patch import unpatch
from attnswap.training.config import TrainConfig


class Teacher:
    """A model whose outputs a student learns to reproduce. Create one with :func:`teacher_of`.

    Args:
        model: The teacher's model. It may be the student itself, whose swaps and adapters are then switched off while
            it acts as the teacher.
        shared: Whether the model is the student itself.
        mixed: Autocast dtype of the matrix products; None: no autocast.
    """

    def __init__(self, model: PreTrainedModel, *, shared: bool, mixed: torch.dtype | None = None) -> None:
        self.model, self.shared, self.mixed = model, shared, mixed
        self._empty_outputs: Any = None

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Switches off swaps, adapters, dropout and gradients inside a ``with`` block."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.shared:
                if is_patched(self.model):
                    stack.enter_context(bypassed(self.model))
                stack.enter_context(_without_adapters(self.model))
                stack.enter_context(evaluating(self.model))
            elif self.mixed is not None:
                stack.enter_context(torch.autocast(self.model.device.type, self.mixed))
            yield

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Returns the last hidden states, shape (batch, tokens, width).

        A teacher with its own weights is first moved to the device of the inputs.
        """
        if not self.shared:
            self.model.to(device=inputs["input_ids"].device)  # type: ignore[call-arg]
        with self.as_teacher():
            outputs = body_of(self.model)(**inputs, use_cache=False)
        self._empty_outputs = type(outputs)()
        return outputs.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits (rows, vocabulary) of hidden states (rows, width) that :meth:`hidden` returned."""
        with self.as_teacher():
            return head_logits(self.model, self._empty_outputs, hidden[None])[0]


def teacher_of(model: PreTrainedModel, *, dtype: torch.dtype = torch.bfloat16) -> Teacher:
    """Returns the teacher of a patched model: the model before patching. Call it before training.

    If the model's original weights are frozen (LoRA, or only the swaps' parameters are trained), the teacher uses
    them too, and nothing is copied. Otherwise it is a frozen copy without the swaps, see :func:`frozen_teacher`.

    Args:
        model: The student. The parameters that will be trained must already require gradients.
        dtype: Dtype of the matrices of a copy.

    Raises:
        ConfigError: The model has adapters, and other weights of it are trained too.
    """
    inner: PreTrainedModel = base_of(model)
    own = {id(p) for p in swap_parameters(inner).values()}
    adapters = {id(p) for name, p in inner.named_parameters() if "lora_" in name}
    if not any(p.requires_grad and id(p) not in own and id(p) not in adapters for p in inner.parameters()):
        return Teacher(inner, shared=True)
    if adapters:
        raise ConfigError(
            "a model with adapters whose other weights are trained too cannot be copied as its own teacher: freeze its "
            "weights, or merge the adapters"
        )
    twin = copy.deepcopy(inner)
    if is_patched(twin):
        unpatch(twin)
    return frozen_teacher(twin, dtype)


def frozen_teacher(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> Teacher:
    """Turns a model into a teacher, in place: freezes it and converts its matrices to another dtype.

    With 16-bit matrices the teacher computes in the same way as a student in mixed precision, with hidden states in
    fp32, so that an untrained student has a loss of exactly 0. The rounding errors of 16-bit hidden states would be
    larger than what remains to be learned at the end of training, above all where activations are massive.

    Args:
        model: A model in fp32, or in ``dtype``.
        dtype: Dtype of the matrices, except embeddings.
    """
    model.eval().requires_grad_(False)
    kept = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return Teacher(model, shared=False, mixed=None if dtype == model.get_input_embeddings().weight.dtype else dtype)


def matrix_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the dtype of the student's matrix products in a recipe, which its teacher uses too."""
    mixed = next((name for name in ("bf16", "fp16") if config.training.get(name)), None)
    return {"bf16": torch.bfloat16, "fp16": torch.float16, None: getattr(torch, config.model.dtype)}[mixed]


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Switches off the PEFT adapters of a model inside a ``with`` block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
