"""What a swapped model learns from: the model it was."""

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
    """The model a student was before its swaps, ready to answer.

    Make one with :func:`teacher_of`.

    Args:
        model: The model that answers: the student itself, whose swaps are passed by while it does, or another one.
        shared: It is the student itself.
        mixed: Dtype of its matrix products where that is not the dtype of its hidden states.
    """

    def __init__(self, model: PreTrainedModel, *, shared: bool, mixed: torch.dtype | None = None) -> None:
        self.model, self.shared, self.mixed = model, shared, mixed
        self._bare: Any = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Makes the model compute what it did before: no swaps, no adapters, no dropout, no gradients."""
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
        """Returns the last hidden states, shape (batch, tokens, width); a copy follows its student to its device."""
        if not self.shared:
            self.model.to(device=inputs["input_ids"].device)  # type: ignore[call-arg]
        with self.answering():
            outputs = body_of(self.model)(**inputs, use_cache=False)
        self._bare = type(outputs)()
        return outputs.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns the logits (rows, vocabulary) of some of those hidden states (rows, width)."""
        with self.answering():
            return head_logits(self.model, self._bare, hidden[None])[0]


def teacher_of(model: PreTrainedModel, *, dtype: torch.dtype = torch.bfloat16) -> Teacher:
    """Returns the teacher of a patched model, to be made before the model is trained.

    While the model's own weights are frozen (LoRA, or only the swaps' parameters trained) they are the teacher:
    nothing is copied. Otherwise it is a frozen copy without the swaps, see :func:`frozen_teacher`.

    Args:
        model: The student, with whatever will be trained set to require gradients.
        dtype: Dtype of a copy's matrices.

    Raises:
        ConfigError: The model's adapters hold its swaps, and more than they is trained.
    """
    inner: PreTrainedModel = base_of(model)
    own = {id(p) for p in swap_parameters(inner).values()}
    adapters = {id(p) for name, p in inner.named_parameters() if "lora_" in name}
    if not any(p.requires_grad and id(p) not in own and id(p) not in adapters for p in inner.parameters()):
        return Teacher(inner, shared=True)
    if adapters:
        raise ConfigError("a model with adapters whose own weights are trained too cannot be copied as its teacher")
    twin = copy.deepcopy(inner)
    if is_patched(twin):
        unpatch(twin)
    return frozen_teacher(twin, dtype)


def frozen_teacher(model: PreTrainedModel, dtype: torch.dtype = torch.bfloat16) -> Teacher:
    """Makes a model of its own a teacher, in place: frozen, its matrices in another dtype.

    In 16 bits it computes as a student in mixed precision does, with hidden states in fp32, and agrees to the last bit
    with a student that has learned nothing. Hidden states in 16 bits would differ by more than what is left to learn
    at the end, most of all where activations are massive.

    Args:
        model: A model in fp32, or in ``dtype``.
        dtype: Dtype of its matrices but for embeddings.
    """
    model.eval().requires_grad_(False)
    kept = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter.ndim > 1 and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
    return Teacher(model, shared=False, mixed=None if dtype == model.get_input_embeddings().weight.dtype else dtype)


def matrix_dtype(config: TrainConfig) -> torch.dtype:
    """Returns the dtype in which a recipe's student multiplies matrices, and so its teacher should."""
    mixed = next((name for name in ("bf16", "fp16") if config.training.get(name)), None)
    return {"bf16": torch.bfloat16, "fp16": torch.float16, None: getattr(torch, config.model.dtype)}[mixed]


@contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    """Switches off peft's layers of a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
