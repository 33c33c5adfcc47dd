"""Attention-output transfer: each layer learns to attend as it did, on the inputs that the teacher's layer saw.

The layers learn side by side and no layer sees another one's errors: the output of each attention module is put back
to the teacher's, and attention modules alone are trained. What stands between them has nothing to compute.
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
    """What one batch showed of each layer.

    Attributes:
        inputs: The hidden states that entered each of the teacher's attention modules, by layer.
        outputs: What each of them returned.
        plain: Of the modules beside the teacher's attention, whether they made one tensor of another of its shape.
        distances: ``|o - o_teacher|^2 / |o_teacher|^2`` of each of the student's, over what is text.
    """

    def __init__(self, read: Tensor) -> None:
        self.read = read
        self.inputs: dict[Place, Tensor] = {}
        self.outputs: dict[Place, Tensor] = {}
        self.plain: dict[str, bool] = {}
        self.distances: dict[Place, Tensor] = {}

    def distance(self) -> Tensor:
        """Returns the mean over layers."""
        return torch.stack(list(self.distances.values())).mean()


@contextmanager
def transferring(teacher: Teacher, model: PreTrainedModel, inputs: dict[str, Any], read: Tensor) -> Iterator[Transfer]:
    """Runs the teacher on a batch; a forward of the student inside the context is compared layer by layer.

    Args:
        teacher: Who is learned from.
        model: The student.
        inputs: What the decoders take.
        read: Which positions are text, shape (batch, tokens).
    """
    transfer = Transfer(read)
    ours = _modules(model)
    theirs = ours if teacher.shared else _modules(teacher.model, like=model)
    with ExitStack() as stack:
        for layer, module in theirs.items():
            stack.enter_context(_hooked(module, None, _keep(transfer, layer)))
        for name, module in _beside(teacher.model, theirs.values()):
            stack.enter_context(_hooked(module, None, _look(transfer, name)))
        teacher.hidden(inputs)
    with ExitStack() as stack:
        for layer, module in ours.items():
            stack.enter_context(_hooked(module, _replace(transfer, layer), _compare(transfer, layer)))
        for name, module in _beside(model, ours.values()):
            if transfer.plain.get(name):
                stack.enter_context(_idle(module))
        yield transfer


def _modules(model: PreTrainedModel, like: PreTrainedModel | None = None) -> dict[Place, nn.Module]:
    """Returns the attention modules of the patched parts of a model, or of those parts of another model."""
    stacks = stacks_of(model if like is None else like)
    if like is not None:
        stacks = [find_stack(model, stack.part) for stack in stacks]
    return {(i, layer): m for i, stack in enumerate(stacks) for layer, (_, m) in stack.modules.items()}


def _beside(model: PreTrainedModel, attention: Collection[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that share a layer with attention, such as its norm and the feed-forward part."""
    ours = set(attention)
    for prefix, parent in body_of(base_of(model)).named_modules():
        children = dict(parent.named_children())
        if not ours.isdisjoint(children.values()):
            for name, child in children.items():
                if ours.isdisjoint(child.modules()):
                    yield f"{prefix}.{name}", child


@contextmanager
def _idle(module: nn.Module) -> Iterator[None]:
    """Makes a module return zeros: whatever it made would only reach inputs and outputs that are replaced."""
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
    # Before the hook that computes the swap's gates from the hidden states.
    handles = [module.register_forward_hook(after, with_kwargs=True)]
    if before is not None:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keep(transfer: Transfer, layer: Place) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        transfer.inputs[layer] = _hidden(module, args, kwargs)
        transfer.outputs[layer] = _first(output)

    return keep


def _look(transfer: Transfer, name: str) -> Callable[..., None]:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = _given(args, kwargs)
        same = isinstance(given, Tensor) and isinstance(output, Tensor) and given.shape == output.shape
        transfer.plain[name] = same and transfer.plain.get(name, True)

    return look


def _replace(transfer: Transfer, layer: Place) -> Callable[..., Any]:
    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = _hidden(module, args, kwargs)
        given = transfer.inputs[layer].to(own.dtype)
        kwargs = {name: given if value is own else value for name, value in kwargs.items()}
        return tuple(given if value is own else value for value in args), kwargs

    return replace


def _compare(transfer: Transfer, layer: Place) -> Callable[..., Any]:
    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ours, theirs = _first(output), transfer.outputs[layer]
        read = transfer.read.to(ours.device)
        difference = ((ours.float() - theirs.float()).square().sum(-1) * read).sum()
        transfer.distances[layer] = difference / (theirs.float().square().sum(-1) * read).sum().clamp(min=1e-12)
        given = theirs.to(ours.dtype)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return compare


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return kwargs.get("hidden_states", args[0] if args else None)


def _hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = _given(args, kwargs)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(f"{type(module).__name__} is called without hidden states, which a transfer needs")
    return found


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
