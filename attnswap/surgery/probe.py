"""Prove on a tiny forward that a patch does what it says: every selected head of every selected layer reaches us."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import AttnSwapError, UnsupportedModelError
from attnswap.surgery.attach import Modules, child_of, dispatches_all
from attnswap.surgery.inputs import tiny_inputs
from attnswap.surgery.seam import Enter, Leave
from attnswap.surgery.spec import Slot
from attnswap.surgery.stacks import siblings
from attnswap.swaps.base import Call, Swap, Terms
from attnswap.swaps.sigmoid import Sigmoid

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference allowed between stock softmax and ours, relative to the spread of the outputs."""


class Plain(Swap):
    """Softmax itself, computed by us: shows that nothing else in the call was overlooked."""


class Flat(Swap):
    """Not an identity: softmax with its scores halved."""

    def terms(self, call: Call) -> Terms:
        """Halves every score."""
        return Terms(query_scale=torch.full_like(call.n, 0.5))


def verify(model: PreTrainedModel, config: PreTrainedConfig, modules: Modules, before: str) -> None:
    """Checks a freshly connected model.

    Three forwards over a few tokens: the model as it was; with our own softmax in every selected head, which must
    give the same; with a swap that is no identity, whose output must reach the model's output from every selected
    head, as shown by the gradient of a gain on each head.

    Args:
        model: The model, with its slots in place.
        config: The config the attention modules share.
        modules: Its attention modules.
        before: The previous attention implementation.

    Raises:
        UnsupportedModelError: A selected layer or head does not reach us, or our softmax differs from the model's.
    """
    swapped = {i: m for i, (_, m) in modules.items() if child_of(m) is not None}
    connected, every = config._attn_implementation_internal, siblings(model, modules)
    # What is still to be read from a file cannot be compared with the config yet.
    with _quiet(model), _hooked(every, "unchecked", False):
        try:
            config._attn_implementation_internal = before
            with _hooks_silenced(every):
                reference = _forward(model)
            config._attn_implementation_internal = connected
            with _replaced(swapped, Plain()), _hooked(every, "alone", True):
                same = _forward(model)
            # On a CPU flex_attention gives no gradient.
            learns = "eager" if before == "flex_attention" and reference.device.type == "cpu" else before
            hooked = _hooked(every, "before", learns)
            with _replaced(swapped, Flat()), hooked, _gains(swapped) as gains, torch.enable_grad():
                output = _forward(model)
                weights = torch.linspace(1, 2, output.numel(), device=output.device).view_as(output)
                slopes = torch.autograd.grad((output * weights).sum(), list(gains.values()), allow_unused=True)
            _forward(model)  # with the swaps themselves, which may refuse
            if not dispatches_all(modules):
                _check_rows(model, every, swapped)
        except AttnSwapError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot run a forward with attnswap: {type(error).__name__}: {error}"
            ) from error
        finally:
            config._attn_implementation_internal = connected
    spread = float(reference.std()) or 1.0
    difference = float((same - reference).abs().max())
    if not difference <= TOLERANCE.get(model.dtype, 0.2) * spread:
        raise UnsupportedModelError(
            f"{type(model).__name__} computes more in its attention than softmax over masked scores: served by "
            f"attnswap's own softmax its output moves by {difference:.2g} (spread {spread:.2g})"
        )
    for (layer, module), slope in zip(swapped.items(), slopes, strict=True):
        _check_heads(model, layer, module, slope)


def _check_rows(model: PreTrainedModel, every: list[nn.Module], swapped: dict[int, nn.Module]) -> None:
    """Refuses swaps that see what a model adds to a whole row of scores, where that depends on the keys after it."""
    slots = [slot for module in swapped.values() if (child := child_of(module)) for slot in child.slots.values()]
    sees = next((s.swap for s in slots if not s.swap.softmax_weighted and not s.swap.threshold), None)
    if sees is None or model.main_input_name != "input_ids":
        return
    with _hooks_silenced(every):
        looks_ahead = _prefix_gap(model)
    with _replaced(swapped, Sigmoid(bias=0.0)):  # which weighs each key by its own score
        moves = _prefix_gap(model)
    if moves > 1e-3 >= looks_ahead:
        raise UnsupportedModelError(
            f"{type(model).__name__} adds to each row of its scores a number that depends on the length of the input; "
            f'softmax does not see it, but "{sees.name}" does. Choose a swap whose rows sum to one'
        )


def _prefix_gap(model: PreTrainedModel) -> float:
    """How far the output at the first tokens moves when another token follows them."""
    inputs = tiny_inputs(model)
    short = {k: x[:1, :-1] if isinstance(x, Tensor) and x.ndim == 2 else x for k, x in inputs.items()}
    long = {k: x[:1] if isinstance(x, Tensor) else x for k, x in inputs.items()}
    before, after = model(**short)[0], model(**long)[0]
    if before.ndim != 3:
        return 0.0
    return float((after[:, :-1] - before).abs().max() / after.std())


def _check_heads(model: PreTrainedModel, layer: int, module: nn.Module, slope: Tensor | None) -> None:
    child = child_of(module)
    assert child is not None
    for slot in child.slots.values():
        for head in range(child.info.heads) if slot.heads is None else slot.heads:
            if slope is None or not bool(slope[head] != 0):
                raise UnsupportedModelError(
                    f"head {head} of layer {layer} ({type(module).__name__}) of {type(model).__name__} has no effect "
                    "on the model's output when its attention is served by attnswap"
                )


def _forward(model: PreTrainedModel) -> Tensor:
    """Runs two short inputs and returns the outputs in fp32, of tokens those that are no padding."""
    inputs = tiny_inputs(model)
    output = model(**inputs)[0]
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if mask is not None and output.shape[:2] == mask.shape:
        output = output[mask.bool()]
    return output.float()


@contextlib.contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; random state and each module's mode are put back."""
    modes = [(m, m.training) for m in model.modules()]
    cuda = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextlib.contextmanager
def _hooks_silenced(modules: list[nn.Module]) -> Iterator[None]:
    """Runs the attention modules as if they had never been touched."""
    saved = []
    for module in modules:
        tables = (module._forward_pre_hooks, module._forward_hooks)
        saved.append([(t, dict(t)) for t in tables])
        for table in tables:
            for key in [k for k, h in table.items() if isinstance(h, Enter | Leave)]:
                del table[key]
    try:
        yield
    finally:
        for tables_of in saved:
            for table, content in tables_of:
                table.clear()
                table.update(content)


@contextlib.contextmanager
def _replaced(swapped: dict[int, nn.Module], swap: Swap) -> Iterator[None]:
    """Serves every slot with another swap at lambda 1."""
    saved = []
    for module in swapped.values():
        child = child_of(module)
        assert child is not None
        saved.append((child, child.slots, child.forward))
        child.slots = {name: Slot(swap, slot.heads) for name, slot in child.slots.items()}
        empty = {name: {"ramp": torch.ones(())} for name in child.slots}
        child.forward = lambda hidden, empty=empty: empty  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        for child, slots, _ in saved:
            child.slots = slots
            del child.forward


@contextlib.contextmanager
def _hooked(modules: list[nn.Module], name: str, value: Any) -> Iterator[None]:
    """Gives the pre-hooks of all attention modules another value of an attribute."""
    hooks = [h for m in modules for h in m._forward_pre_hooks.values() if isinstance(h, Enter)]
    saved = [getattr(hook, name) for hook in hooks]
    try:
        for hook in hooks:
            setattr(hook, name, value)
        yield
    finally:
        for hook, old in zip(hooks, saved, strict=True):
            setattr(hook, name, old)


@contextlib.contextmanager
def _gains(swapped: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Multiplies each head's output by a gain of 1 that asks for its gradient."""
    gains, hooks = {}, []
    for layer, module in swapped.items():
        child = child_of(module)
        assert child is not None
        device = next(module.parameters()).device
        gains[layer] = torch.ones(child.info.heads, device=device, requires_grad=True)
        hook = next(h for h in module._forward_pre_hooks.values() if isinstance(h, Enter))
        hook.probe = gains[layer]
        hooks.append(hook)
    try:
        yield gains
    finally:
        for hook in hooks:
            hook.probe = None
