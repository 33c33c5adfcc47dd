"""Patch a model in place, undo it, and describe what was done."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from attnswap.errors import ConfigError
from attnswap.loading import clear_dequantized_flags
from attnswap.surgery.attach import attach, own_config
from attnswap.surgery.connect import disconnect
from attnswap.surgery.entry import clear_entries, is_patched
from attnswap.surgery.guard import guard, unguard
from attnswap.surgery.move import check_one_ramp
from attnswap.surgery.owners import outermost
from attnswap.surgery.patched import patched_stacks, refuse_adapters
from attnswap.surgery.plan import HeadsLike, make_plan, swaps_with_heads
from attnswap.surgery.probe import verify
from attnswap.surgery.report import PatchReport, build_report
from attnswap.surgery.select import LayersLike
from attnswap.surgery.spec import KEY
from attnswap.surgery.stacks import refuse_half
from attnswap.surgery.undo import all_or_nothing
from attnswap.swaps import Swap, SwapLike


def patch(
    model: PreTrainedModel,
    swap: SwapLike | Mapping[str | Swap, HeadsLike],
    *,
    part: str | None = None,
    layers: LayersLike = None,
    heads: HeadsLike = None,
    ramp: float = 1.0,
) -> PatchReport:
    """Patches a swap into the attention layers of a model, in place.

    Only this instance changes; other models of the same class in the process stay as they are. Layers and heads that
    are not selected keep the attention implementation that the model had. A forward pass over a few tokens then
    verifies that the swap computes every selected head; if not, the model is restored.

    Args:
        model: A ``transformers`` model.
        swap: A name, config or mapping with a name (``{"name": "ssmax", "form": "scale"}``); or several of them with
            their heads: ``{"forgetting-gate": [0, 1], SSMax(form="scale"): [2, 3]}``.
        part: Which attention modules, in a model with several kinds: consecutive words of the module names, such as
            ``"encoder"``, ``"decoder"``, ``"vision_tower"`` or ``"encoder.layers.*.self_attn"``, or ``"cross"`` for
            cross-attention. Default: the part that is patched already, otherwise self-attention, of the decoder or text
            tower if there are several. To patch several parts, call this function once for each.
        layers: Index, slice string (``"8:"``), list, or predicate of the layer index; default: all.
        heads: Query heads; default: all.
        ramp: lambda, from 0 (the attention before patching, exactly) to 1 (the swap).

    Returns:
        The swap of each head of each layer.

    Raises:
        ConfigError: A swap, layer, head or ramp does not exist or does not fit, or a head has a swap already.
        UnsupportedModelError: attnswap cannot compute this model's attention correctly. After either error the model
            is unchanged.
    """
    whole = outermost(model)
    plan = make_plan(model, whole, part, swaps_with_heads(swap, heads), layers, check_one_ramp(ramp))
    with all_or_nothing(whole):
        own_config(whole)
        attach(plan.stack, plan.spec, plan.added)
        verify(plan.stack, plan.spec.before)
        guard(whole)
        cleared = clear_dequantized_flags(model)
        notes = [f"cleared stale quantization flags of a dequantized model: {', '.join(cleared)}"] if cleared else []
        return build_report(model, patched_stacks(model), notes)


def unpatch(model: PreTrainedModel) -> None:
    """Takes every swap out again: the model computes its original attention, bit for bit, with its present weights.

    Args:
        model: A patched model.

    Raises:
        ConfigError: The model is not patched, its swaps belong to adapters, or it is a submodule that shares its config
            with patched attention modules outside of it (unpatch the outer model).
    """
    refuse_adapters(model)
    found = patched_stacks(model, read=False)
    if not found:
        raise ConfigError(f"this {type(model).__name__} is not patched")
    whole = outermost(model)
    for stack, _ in found:
        refuse_half(stack, whole)
    with all_or_nothing(whole):
        for stack, spec in found:
            disconnect(stack, spec.before)
        clear_entries(model, found[0][1].before)
        unguard(whole)
        if is_patched(whole):  # another part of it
            guard(whole)
        for module in model.modules():
            kept = module.__dict__.get("_keep_in_fp32_modules_strict")
            if isinstance(kept, set):
                kept.discard(KEY)
            module.__dict__.pop("_init_weights", None)


def describe(model: PreTrainedModel) -> PatchReport:
    """Returns a report of the swap of each head in each layer; an unpatched model has its own attention in all rows."""
    return build_report(model, patched_stacks(model), [])
