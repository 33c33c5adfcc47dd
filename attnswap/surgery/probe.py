"""Prove on a tiny forward that a patch does what it says: every selected head of every selected layer reaches us."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.errors import AttnSwapError, UnsupportedModelError
from attnswap.modes import evaluating
from attnswap.surgery.attach import Modules, child_of, dispatches_all, enter_of
from attnswap.surgery.inputs import real_tokens, tiny_inputs
from attnswap.surgery.scores import Answering
from attnswap.surgery.seam import Enter
from attnswap.surgery.spec import Slot
from attnswap.surgery.stacks import siblings
from attnswap.swaps.base import Swap
from attnswap.swaps.sigmoid import Sigmoid

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest difference allowed between stock softmax and ours, relative to the spread of the outputs."""


@dataclass
class Seen:
    """What one forward gave.

    Attributes:
        output: The model's output, in fp32; of tokens those that are no padding.
        parts: The same of each selected attention module, call by call.
        slopes: The gradients of the gains of each layer's heads; None where there is none.
    """

    output: Tensor
    parts: list[Tensor]
    slopes: list[Tensor | None] = field(default_factory=list)


def verify(model: PreTrainedModel, config: PreTrainedConfig, modules: Modules, before: str) -> None:
    """Checks a freshly connected model.

    Two forwards over a few tokens: the model as it was; and with our own softmax in every selected head, which must
    give the same, and which must reach the output of its attention module from every selected head, as shown by the
    gradient of a gain on each. The swaps themselves run beside it, since they may refuse what enters their layer.

    Both run first without the products outside of attention, which take most of the time. Where that does not show
    it, they run whole.

    Args:
        model: The model, with its slots in place.
        config: The config the attention modules share.
        modules: Its attention modules.
        before: The previous attention implementation.

    Raises:
        UnsupportedModelError: A selected layer or head does not reach us, or our softmax differs from the model's.
    """
    swapped = {i: m for i, (_, m) in modules.items() if child_of(m) is not None}
    every = siblings(model, modules)
    both = partial(_both, model, config, every, swapped, before)
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
                with _replaced(swapped, Swap()):  # first, since it says more of the model than a swap's error does
                    reference, same = both()
                _check(model, swapped, [reference.output], [same.output], same.slopes)
                _forward(model, _learnable(model))
            if not dispatches_all(modules):
                _check_rows(model, every, swapped)
        except AttnSwapError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot run a forward with attnswap: {type(error).__name__}: {error}"
            ) from error


def _both(
    model: PreTrainedModel, config: PreTrainedConfig, every: list[nn.Module], swapped: dict[int, nn.Module], before: str
) -> tuple[Seen, Seen]:
    """Runs the model as it was, and served by our own softmax."""
    run = partial(_forward, model, _learnable(model))
    connected = config._attn_implementation_internal
    try:
        config._attn_implementation_internal = before
        with _muted(every), _collected(swapped) as parts:
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
    found = torch.autograd.grad(sums, list(gains.values()), weights, allow_unused=True) if sums else [None] * len(gains)
    same.slopes = list(found)
    return reference, same


def _shown_hollow(
    model: PreTrainedModel,
    every: list[nn.Module],
    swapped: dict[int, nn.Module],
    both: Callable[[], tuple[Seen, Seen]],
) -> bool:
    """Whether attention alone shows what is to be shown; each module is then compared by itself."""
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
    swapped: dict[int, nn.Module],
    reference: list[Tensor],
    same: list[Tensor],
    slopes: list[Tensor | None],
) -> None:
    """Refuses outputs that are not the same, and heads whose gain has no gradient."""
    pairs = zip(reference, same, strict=True)
    both = torch.stack([torch.stack([(now - was).abs().max(), was.std()]).cpu() for was, now in pairs])
    for difference, spread in both.tolist():
        if not difference <= TOLERANCE.get(model.dtype, 0.2) * (spread or 1.0):
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
    with _muted(every):
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
    reached = [False] * child.info.heads if slope is None else (slope != 0).tolist()
    for slot in child.slots.values():
        for head in range(child.info.heads) if slot.heads is None else slot.heads:
            if not reached[head]:
                raise UnsupportedModelError(
                    f"head {head} of layer {layer} ({type(module).__name__}) of {type(model).__name__} has no effect "
                    "on the output of that module when its attention is served by attnswap"
                )


def _learnable(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns stand-ins for tensors that were made in inference mode, through which autograd does not go."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors if tensor.is_inference()}


def _forward(model: PreTrainedModel, stand_ins: dict[str, Tensor]) -> Tensor:
    """Runs two short inputs."""
    inputs = tiny_inputs(model)
    return _real((functional_call(model, stand_ins, kwargs=inputs) if stand_ins else model(**inputs))[0])


def _real(output: Tensor) -> Tensor:
    """Returns outputs in fp32, of tokens those that are no padding."""
    real = real_tokens(output.device)
    return (output[real.bool()] if output.shape[:2] == real.shape else output).float()


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Runs layers that ``torch.compile`` wraps without it: the proof changes what a graph takes for constant."""
    compiled = any(isinstance(m, OptimizedModule) or m._compiled_call_impl is not None for m in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@contextlib.contextmanager
def _muted(modules: list[nn.Module]) -> Iterator[None]:
    """Runs the attention modules as if they had never been touched."""
    found = [x for m in modules for x in (enter_of(m), m.__dict__.get("forward")) if isinstance(x, Enter | Answering)]
    try:
        for one in found:
            one.muted = True
        yield
    finally:
        for one in found:
            one.muted = False


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
    hooks = [enter for m in modules if (enter := enter_of(m))]
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
    routes = {id(enter.route): enter.route for m in modules if (enter := enter_of(m))}
    saved = [(route, route.before) for route in routes.values()]
    try:
        for route, _ in saved:
            route.before = name
        yield
    finally:
        for route, before in saved:
            route.before = before


@contextlib.contextmanager
def _gains(swapped: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Has our softmax serve every slot, each head's output times a gain of 1 that asks for its gradient."""
    gains, hooks = {}, []
    for layer, module in swapped.items():
        child = child_of(module)
        assert child is not None
        device = next(module.parameters()).device
        gains[layer] = torch.ones(child.info.heads, device=device, requires_grad=True)
        hook = enter_of(module)
        assert hook is not None
        hook.gains = gains[layer]
        hooks.append(hook)
    try:
        yield gains
    finally:
        for hook in hooks:
            hook.gains = None


@contextlib.contextmanager
def _collected(swapped: dict[int, nn.Module], learn: bool = False) -> Iterator[list[Tensor]]:
    """Collects what the attention modules give.

    Args:
        swapped: The modules.
        learn: Turns on gradients within these modules: a backward of the whole model would cost more than a forward.
    """
    found: list[Tensor] = []

    def enter(*_: Any) -> None:
        torch.set_grad_enabled(learn)

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        found.extend([_real(value) for value in tree_leaves(output) if isinstance(value, Tensor)][:1])
        torch.set_grad_enabled(False)

    handles = [module.register_forward_pre_hook(enter) for module in swapped.values()]
    handles += [module.register_forward_hook(leave) for module in swapped.values()]
    try:
        with torch.no_grad():  # whose end puts the mode back, wherever a forward ends
            yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hollow(model: nn.Module, attention: list[nn.Module]) -> Iterator[None]:
    """Has linear layers outside of attention hand on numbers of their input, as many as they would give.

    Outputs stay those of different tokens, so that a mask or an order that is wrong still shows.
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
