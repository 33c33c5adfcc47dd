"""Connect the attention modules of a stack with attnswap, by hooks and the name of its attention function, and back."""

from collections.abc import Iterable

from torch import nn

from attnswap.errors import UnsupportedModelError
from attnswap.surgery.entry import write_spec
from attnswap.surgery.hooks import remove_hooks
from attnswap.surgery.module import child_of
from attnswap.surgery.scores import intercept, release
from attnswap.surgery.seam import GateHook, Route, ServedCheck, gate_hook_of, route_of
from attnswap.surgery.spec import KEY
from attnswap.surgery.stacks import AttentionStack
from attnswap.surgery.tied import retie, untie


def connect(stack: AttentionStack, before: str, loading: bool = False) -> None:
    """Routes every attention module through attnswap; modules without slots compute as before.

    Args:
        stack: The modules that may have slots. Others with the same config are routed too.
        before: The previous attention implementation.
        loading: The swaps' tensors are yet to be read; the first forward then checks them.

    Raises:
        UnsupportedModelError: Other attention with the same config is patched at another seam.
    """
    through_interface, config = stack.seam == "interface", stack.config
    untie(stack)
    route = route_of(stack.siblings)
    if route is not None and route.dispatched != through_interface and any(map(child_of, stack.siblings)):
        raise UnsupportedModelError(
            f"{stack.name} and another attention of {type(stack.model).__name__} that is patched already share one "
            "config, but only one of them calls transformers' attention interface. Patch one of them"
        )
    route = route or Route(before, through_interface)
    if through_interface:
        config._attn_implementation_internal = KEY
    elif config._attn_implementation == KEY:
        config._attn_implementation_internal = before
    layers = {id(module): layer for layer, (_, module) in stack.modules.items()}
    for module in stack.siblings:
        hook = gate_hook_of(module)
        if hook is None:
            hook = GateHook(route, loading)
            module.register_forward_pre_hook(hook, with_kwargs=True)
            module.register_forward_hook(ServedCheck(hook), with_kwargs=True)
            if not through_interface:
                intercept(module)
        if id(module) in layers:
            hook.layer, hook.cross = layers[id(module)], stack.cross


def disconnect(stack: AttentionStack, before: str) -> None:
    """Undoes :func:`connect` and removes every slot."""
    unhook(stack.siblings)
    retie(stack.model)
    stack.config._attn_implementation_internal = before
    write_spec(stack, None)


def unhook(modules: Iterable[nn.Module]) -> None:
    """Takes hooks and swaps off attention modules."""
    modules = list(modules)
    for module in modules:
        module._modules.pop(KEY, None)
        release(module)
    remove_hooks(modules, "_forward_pre_hooks", GateHook)
    remove_hooks(modules, "_forward_hooks", ServedCheck)
