"""Transfer of attention outputs: each attention module learns the output of the teacher's, on the teacher's input.

The attention modules are trained independently of each other: each gets the input of the teacher's module, and passes
on the output of the teacher's module. So errors do not accumulate over layers, and the modules between the attention
modules need not compute anything.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnswap.errors import UnsupportedModelError
from attnswap.surgery.body import base_of, body_of
from attnswap.surgery.patched import stacks_of
from attnswap.surgery.stacks import find_stack
from attnswap.training.teacher import Teacher

Place = tuple[int, int]
"""The number of a part of the model, and the index of a layer in it."""


class Transfer:
    """The inputs, outputs and distances of all attention modules for one batch.

    Args:
        text_mask: Which positions are text and not padding, shape (batch, tokens).

    Attributes:
        inputs: Input hidden states of the teacher's attention modules, by layer.
        outputs: Outputs of the teacher's attention modules, by layer.
        keeps_shape: By name of the teacher's other modules: whether the module maps a tensor to one of the same shape.
        distances: ``|o - o_teacher|^2 / |o_teacher|^2`` of the student's attention modules over the text, by layer.
    """

    def __init__(self, text_mask: Tensor) -> None:
        self.text_mask = text_mask
        self.inputs: dict[Place, Tensor] = {}
        self.outputs: dict[Place, Tensor] = {}
        self.keeps_shape: dict[str, bool] = {}
        self.distances: dict[Place, Tensor] = {}

    def distance(self) -> Tensor:
        """Returns the mean distance over layers."""
        return torch.stack(list(self.distances.values())).mean()


@contextmanager
def transferring(
    teacher: Teacher, model: PreTrainedModel, inputs: dict[str, Any], text_mask: Tensor
) -> Iterator[Transfer]:
    """Runs the teacher on a batch, and compares the attention outputs of a student's forward inside the context.

    Args:
        teacher: The teacher.
        model: The student.
        inputs: The inputs of both decoders.
        text_mask: Which positions are text and not padding, shape (batch, tokens).
    """
    transfer = Transfer(text_mask)
    ours = _attention_modules(model)
    theirs = ours if teacher.shared else _attention_modules(teacher.model, like=model)
    with ExitStack() as stack:
        for layer, module in theirs.items():
            stack.enter_context(_hooked(module, None, _record(transfer, layer)))
        for name, module in _other_modules(teacher.model, theirs.values()):
            stack.enter_context(_hooked(module, None, _record_shapes(transfer, name)))
        teacher.hidden(inputs)
    with ExitStack() as stack:
        for layer, module in ours.items():
            stack.enter_context(_hooked(module, _replace_input(transfer, layer), _compare(transfer, layer)))
        for name, module in _other_modules(model, ours.values()):
            if transfer.keeps_shape.get(name):
                stack.enter_context(_returning_zeros(module))
        yield transfer


def _attention_modules(model: PreTrainedModel, like: PreTrainedModel | None = None) -> dict[Place, nn.Module]:
    """Returns the attention modules of the patched parts of a model, or of the same parts of another model."""
    stacks = stacks_of(model if like is None else like)
    if like is not None:
        stacks = [find_stack(model, stack.part) for stack in stacks]
    return {(i, layer): m for i, stack in enumerate(stacks) for layer, (_, m) in stack.modules.items()}


def _other_modules(model: PreTrainedModel, attention: Collection[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the siblings of the attention modules in their layers, such as norms and feed-forward modules."""
    ours = set(attention)
    for prefix, parent in body_of(base_of(model)).named_modules():
        children = dict(parent.named_children())
        if not ours.isdisjoint(children.values()):
            for name, child in children.items():
                if ours.isdisjoint(child.modules()):
                    yield f"{prefix}.{name}", child


@contextmanager
def _returning_zeros(module: nn.Module) -> Iterator[None]:
    """Makes a module return zeros, to save its time: its output only reaches tensors that are replaced."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: torch.zeros_like(_hidden(module, args, kwargs))
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@contextmanager
def _hooked(module: nn.Module, before: Callable[..., Any] | None, after: Callable[..., Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(after, with_kwargs=True)]
    if before is not None:
        # First of all pre-hooks: the hook of the swap computes gates from the hidden states that this one replaces.
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _record(transfer: Transfer, layer: Place) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        transfer.inputs[layer] = _hidden(module, args, kwargs)
        transfer.outputs[layer] = _first(output)

    return record


def _record_shapes(transfer: Transfer, name: str) -> Callable[..., None]:
    def record_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _given(args, kwargs)
        same = isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape
        transfer.keeps_shape[name] = same and transfer.keeps_shape.get(name, True)

    return record_shapes


def _replace_input(transfer: Transfer, layer: Place) -> Callable[..., Any]:
    def replace_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = _hidden(module, args, kwargs)
        given = transfer.inputs[layer].to(own.dtype)
        kwargs = {name: given if value is own else value for name, value in kwargs.items()}
        return tuple(given if value is own else value for value in args), kwargs

    return replace_input


def _compare(transfer: Transfer, layer: Place) -> Callable[..., Any]:
    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ours, theirs = _first(output), transfer.outputs[layer]
        text_mask = transfer.text_mask.to(ours.device)
        difference = ((ours.float() - theirs.float()).square().sum(-1) * text_mask).sum()
        norm = (theirs.float().square().sum(-1) * text_mask).sum()
        transfer.distances[layer] = difference / norm.clamp(min=1e-12)
        given = theirs.to(ours.dtype)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return compare


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("hidden_states", args[0] if args else None)


def _hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = _given(args, kwargs)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} is not called with hidden states as its first argument, as loss.transfer "
            "requires: use loss.kl for this architecture"
        )
    return found


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
