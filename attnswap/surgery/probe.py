"""Prove on a tiny forward that a patch does what it says: every selected head of every selected layer reaches us."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from attnswap.errors import AttnSwapError, UnsupportedModelError
from attnswap.modes import evaluating
from attnswap.surgery.inputs import prefix_gap, real_output, run_tiny
from attnswap.surgery.module import child_of
from attnswap.surgery.scores import InterceptedForward
from attnswap.surgery.seam import GateHook, gate_hook_of
from attnswap.surgery.spec import Slot
from attnswap.surgery.stacks import AttentionStack
from attnswap.swaps.base import Swap
from attnswap.swaps.sigmoid import Sigmoid
from attnswap.swaps.softmax import Softmax

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference allowed between stock softmax and ours, relative to the spread of the outputs."""


@dataclass
class Seen:
    """The results of one forward.

    Attributes:
        output: The model's output, in fp32; of tokens those that are no padding.
        parts: The same of each selected attention module, call by call.
        slopes: The gradients of the gains of each layer's heads; None where there is none.
    """

    output: Tensor
    parts: list[Tensor]
    slopes: list[Tensor | None] = field(default_factory=list)


def verify(stack: AttentionStack, before: str) -> None:
    """Checks a freshly connected stack, together with other patched attention of the same config.

    Two forwards over a few tokens: the model as it was; and with our own softmax in every selected head, which must
    give the same, and which must reach the output of its attention module from every selected head, as shown by the
    gradient of a gain on each. The swaps themselves run beside it, since they may refuse what enters their layer.

    Both run first without the linear layers outside of attention, which take most of the time. If that is no proof,
    the whole model runs.

    Args:
        stack: The attention modules, with their slots in place.
        before: The previous attention implementation.

    Raises:
        UnsupportedModelError: A selected layer or head does not reach us, or our softmax differs from the model's.
    """
    model, every = stack.model, stack.siblings
    swapped = [module for module in every if child_of(module) is not None]
    both = partial(_both, stack, swapped, before)
    # What is still to be read from a file cannot be compared with the config yet.
    # The generators of random numbers are left alone: they are the process's, and other threads draw from them.
    with (
        _uncompiled(model),
        torch.inference_mode(False),
        torch.no_grad(),
        evaluating(model),
        _hooked(every, "unchecked", False),
    ):
        try:
            if not _shown_hollow(model, every, swapped, both):
                with _replaced(swapped, Softmax()):  # first, since it says more of the model than a swap's error does
                    reference, same = both()
                _check(model, swapped, [reference.output], [same.output], same.slopes)
                run_tiny(model)
            if stack.seam == "scores":
                _check_rows(model, every, swapped)
        except AttnSwapError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot run a forward with attnswap: {type(error).__name__}: {error}"
            ) from error


def _both(stack: AttentionStack, swapped: list[nn.Module], before: str) -> tuple[Seen, Seen]:
    """Runs the model as it was, and served by our own softmax."""
    run = partial(run_tiny, stack.model)
    config, every = stack.config, stack.siblings
    connected = config._attn_implementation_internal
    try:
        config._attn_implementation_internal = before
        with _disabled(every), _collected(swapped) as parts:
            reference = Seen(run(), parts)
        config._attn_implementation_internal = connected
        # On a CPU flex_attention gives no gradient.
        learns = "eager" if before == "flex_attention" and reference.output.device.type == "cpu" else before
        with _before(every, learns), _gains(swapped) as gains, _collected(swapped, learn=True) as parts:
            same = Seen(run(), [part.detach() for part in parts])
    finally:
        config._attn_implementation_internal = connected
    sums = [part for part in parts if part.requires_grad]
    weights = [torch.linspace(1, 2, part.numel(), device=part.device).view_as(part) for part in sums]
    found = torch.autograd.grad(sums, gains, weights, allow_unused=True) if sums else [None] * len(gains)
    same.slopes = list(found)
    return reference, same


def _shown_hollow(
    model: PreTrainedModel,
    every: list[nn.Module],
    swapped: list[nn.Module],
    both: Callable[[], tuple[Seen, Seen]],
) -> bool:
    """Whether the forward without other linear layers is proof enough; it compares each module by itself."""
    try:
        with _hollow(model, every):
            reference, same = both()
        _check(model, swapped, reference.parts, same.parts, same.slopes)
        # Tokens that are all alike would be so under any mask.
        return all(bool(p.flatten(0, -2).std(0).max() > 1e-3 * p.abs().max()) for p in reference.parts)
    except Exception:  # of whatever kind: the whole model says what is wrong, if something is
        return False


def _check(
    model: PreTrainedModel,
    swapped: list[nn.Module],
    reference: list[Tensor],
    same: list[Tensor],
    slopes: list[Tensor | None],
) -> None:
    """Refuses outputs that differ, and heads whose gain has no gradient."""
    pairs = zip(reference, same, strict=True)
    both = torch.stack([torch.stack([(now - was).abs().max(), was.std()]).cpu() for was, now in pairs])
    for difference, spread in both.tolist():
        if not difference <= TOLERANCE.get(model.dtype, 0.2) * (spread or 1.0):
            raise UnsupportedModelError(
                f"{type(model).__name__} computes more in its attention than softmax over masked scores: served by "
                f"attnswap's own softmax its output moves by {difference:.2g} (spread {spread:.2g})"
            )
    for module, slope in zip(swapped, slopes, strict=True):
        _check_heads(model, module, slope)


def _check_rows(model: PreTrainedModel, every: list[nn.Module], swapped: list[nn.Module]) -> None:
    """Refuses swaps that see what a model adds to a whole row of scores, where that depends on the keys after it."""
    slots = [slot for module in swapped if (child := child_of(module)) for slot in child.slots.values()]
    sees = next((s.swap for s in slots if s.swap.traits.route == "elementwise"), None)
    if sees is None or model.main_input_name != "input_ids":
        return
    with _disabled(every):
        looks_ahead = prefix_gap(model)
    with _replaced(swapped, Sigmoid(bias=0.0)):  # which weighs each key by its own score
        moves = prefix_gap(model)
    if moves > 1e-3 >= looks_ahead:
        raise UnsupportedModelError(
            f"{type(model).__name__} adds to each row of its scores a number that depends on the length of the input; "
            f'softmax does not see it, but "{sees.name}" does. Choose a swap whose rows sum to one'
        )


def _check_heads(model: PreTrainedModel, module: nn.Module, slope: Tensor | None) -> None:
    child, hook = child_of(module), gate_hook_of(module)
    assert child is not None
    assert hook is not None
    reached = [False] * child.info.heads if slope is None else (slope != 0).tolist()
    for slot in child.slots.values():
        for head in range(child.info.heads) if slot.heads is None else slot.heads:
            if not reached[head]:
                raise UnsupportedModelError(
                    f"head {head} of layer {hook.layer} ({type(module).__name__}) of {type(model).__name__} has no "
                    "effect on the output of that module when its attention is served by attnswap"
                )


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Runs layers that ``torch.compile`` wraps without it: the proof changes what a graph takes for constant."""
    compiled = any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def _disabled(modules: list[nn.Module]) -> Iterator[None]:
    """Runs the attention modules as if they had never been touched."""
    found = [
        x
        for m in modules
        for x in (gate_hook_of(m), m.__dict__.get("forward"))
        if isinstance(x, GateHook | InterceptedForward)
    ]
    try:
        for one in found:
            one.disabled = True
        yield
    finally:
        for one in found:
            one.disabled = False


@contextlib.contextmanager
def _replaced(swapped: list[nn.Module], swap: Swap) -> Iterator[None]:
    """Serves every slot with another swap at lambda 1."""
    saved = []
    for module in swapped:
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
    hooks = [hook for m in modules if (hook := gate_hook_of(m))]
    saved = [getattr(hook, name) for hook in hooks]
    try:
        for hook in hooks:
            setattr(hook, name, value)
        yield
    finally:
        for hook, old in zip(hooks, saved, strict=True):
            setattr(hook, name, old)


@contextlib.contextmanager
def _before(modules: list[nn.Module], name: str) -> Iterator[None]:
    """Sends what is not swapped to another implementation."""
    routes = {id(hook.route): hook.route for m in modules if (hook := gate_hook_of(m))}
    saved = [(route, route.before) for route in routes.values()]
    try:
        for route, _ in saved:
            route.before = name
        yield
    finally:
        for route, before in saved:
            route.before = before


@contextlib.contextmanager
def _gains(swapped: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Has our softmax serve every slot, each head's output times a gain of 1 that asks for its gradient."""
    gains, hooks = [], []
    for module in swapped:
        child, hook = child_of(module), gate_hook_of(module)
        assert child is not None
        assert hook is not None
        device = next(module.parameters()).device
        hook.gains = torch.ones(child.info.heads, device=device, requires_grad=True)
        gains.append(hook.gains)
        hooks.append(hook)
    try:
        yield gains
    finally:
        for hook in hooks:
            hook.gains = None


@contextlib.contextmanager
def _collected(swapped: list[nn.Module], learn: bool = False) -> Iterator[list[Tensor]]:
    """Collects the outputs of the attention modules.

    Args:
        swapped: The modules.
        learn: Turns on gradients within these modules: a backward of the whole model would cost more than a forward.
    """
    found: list[Tensor] = []

    def enter(*_: Any) -> None:
        torch.set_grad_enabled(learn)

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        found.extend([real_output(value) for value in tree_leaves(output) if isinstance(value, Tensor)][:1])
        torch.set_grad_enabled(False)

    handles = [module.register_forward_pre_hook(enter) for module in swapped]
    handles += [module.register_forward_hook(leave) for module in swapped]
    try:
        with torch.no_grad():  # whose end puts the mode back, wherever a forward ends
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hollow(model: nn.Module, attention: list[nn.Module]) -> Iterator[None]:
    """Makes linear layers outside of attention return their input, cut or repeated to the width of their output.

    Different tokens keep different hidden states, so that a wrong mask or order is still detected.
    """
    inside = {id(part) for module in attention for part in module.modules()}
    replaced = []
    for module in model.modules():
        plain = type(module) is nn.Linear and type(module.weight.data) is Tensor  # neither rounded nor sharded
        if plain and id(module) not in inside and "forward" not in vars(module):
            replaced.append(module)
    try:
        for module in replaced:
            module.forward = partial(_hand_on, module)  # type: ignore[method-assign]
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


def _hand_on(module: Any, x: Tensor) -> Tensor:
    times = -(-module.out_features // x.shape[-1])
    return x.repeat(*(1 for _ in x.shape[1:]), times)[..., : module.out_features]
