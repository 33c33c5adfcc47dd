"""Attention-output transfer: each layer learns to attend as it did, on the inputs that the teacher's layer saw.

The layers learn side by side and no layer sees another one's errors: the output of each attention module is put back
to the teacher's, so that what follows computes what it always did. Attention modules alone are trained.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnswap.errors import UnsupportedModelError
from attnswap.surgery.attach import patched_modules, spec_of
from attnswap.surgery.stacks import attention_modules
from attnswap.training.teacher import Teacher


class Transfer:
    """What one batch showed of each layer.

    Attributes:
        inputs: The hidden states that entered each of the teacher's attention modules, by layer.
        outputs: What each of them returned.
        distances: ``|o - o_teacher|^2 / |o_teacher|^2`` of each of the student's, over what is text.
    """

    def __init__(self, read: Tensor) -> None:
        self.read = read
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.distances: dict[int, Tensor] = {}

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
        teacher.hidden(inputs)
    with ExitStack() as stack:
        for layer, module in ours.items():
            stack.enter_context(_hooked(module, _replace(transfer, layer), _compare(transfer, layer)))
        yield transfer


def _modules(model: PreTrainedModel, like: PreTrainedModel | None = None) -> dict[int, nn.Module]:
    found = patched_modules(model) if like is None else attention_modules(model, _part(like))
    return {layer: module for layer, (_, module) in found.items()}


def _part(model: PreTrainedModel) -> str | None:
    spec = spec_of(model)
    return None if spec is None else spec.part


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


def _keep(transfer: Transfer, layer: int) -> Callable[..., None]:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        transfer.inputs[layer] = _hidden(module, args, kwargs)
        transfer.outputs[layer] = _first(output)

    return keep


def _replace(transfer: Transfer, layer: int) -> Callable[..., Any]:
    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = _hidden(module, args, kwargs)
        given = transfer.inputs[layer].to(own.dtype)
        kwargs = {name: given if value is own else value for name, value in kwargs.items()}
        return tuple(given if value is own else value for value in args), kwargs

    return replace


def _compare(transfer: Transfer, layer: int) -> Callable[..., Any]:
    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ours, theirs = _first(output), transfer.outputs[layer]
        read = transfer.read.to(ours.device)
        difference = ((ours.float() - theirs.float()).square().sum(-1) * read).sum()
        transfer.distances[layer] = difference / (theirs.float().square().sum(-1) * read).sum().clamp(min=1e-12)
        given = theirs.to(ours.dtype)
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return compare


def _hidden(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(f"{type(module).__name__} is called without hidden states, which a transfer needs")
    return found


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
