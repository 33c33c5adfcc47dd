"""Calibrate swaps by least squares, from what the original attention computes on some text."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import attnswap
from attnswap.attention.logsumexp import logsumexp
from attnswap.attention.problem import Problem
from attnswap.errors import ConfigError
from attnswap.modes import evaluating
from attnswap.surgery.body import body_of
from attnswap.surgery.call import LayerCall
from attnswap.surgery.module import child_of
from attnswap.surgery.move import follow
from attnswap.surgery.patched import spec_of, stacks_of
from attnswap.surgery.seam import gate_hook_of
from attnswap.surgery.spec import PatchSpec
from attnswap.swaps.base import Observed
from attnswap.training.observing import observing


@torch.no_grad()
def fit(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Sets parameters of a model's swaps by least squares, so that they start close to the original attention.

    Args:
        model: A patched model before training. It runs at a lambda of 0, that is with its original attention.
        batches: Keyword arguments of the model, such as ``input_ids``; 50 to 200 thousand tokens are enough.

    Returns:
        The root mean square of the residuals of each slot, by ``"<layer>.<slot>"``.

    Raises:
        ConfigError: The model is not patched or in several parts, none of its swaps can be fitted, or there are no
            batches.
    """
    spec = spec_of(model)
    if spec is None:
        raise ConfigError(
            f"this {type(model).__name__} is not patched, so that there is nothing to fit: call attnswap.patch first"
        )
    fitted = {
        (layer, name) for layer, slots in spec.layers.items() for name, slot in slots.items() if slot.swap.fit_powers
    }
    if not fitted:
        raise ConfigError(
            "no swap of this model can be fitted (only sigmoid with bias: predicted and entmax with scale: predicted "
            "can): leave the fit out"
        )
    records = _record(model, spec, fitted, batches)
    bar = tqdm(sorted(fitted), desc="fitting", unit="layer", disable=None)
    with torch.autocast("cpu", enabled=False):  # the records are on the CPU
        return {f"{layer}.{name}": _fit_slot(model, layer, name, records[layer, name]) for layer, name in bar}


class _Record:
    """The inputs and row statistics of one slot, batch by batch, on the CPU."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] = []
        self.log_sums: dict[float, list[Tensor]] = {}
        self.n: list[Tensor] = []

    def add(self, hidden: Tensor, problem: Problem) -> None:
        """Adds the tokens of a batch that see at least one key."""
        n = problem.visibility.n.expand(len(problem.query), -1, -1)[:, :1].to(problem.query.device)
        keep = (n > 0).flatten()
        self.hidden.append(hidden.flatten(0, 1)[keep].to("cpu", torch.float16))
        for power in problem.swap.fit_powers:
            found = logsumexp(problem, power).transpose(0, 1).flatten(1)[:, keep]
            self.log_sums.setdefault(power, []).append(found.cpu())
        self.n.append(n.flatten()[keep].to("cpu", torch.float32))

    def observed(self) -> Observed:
        """Returns all batches together."""
        hidden = torch.cat(self.hidden).float()
        sums = {power: torch.cat(parts, 1).float() for power, parts in self.log_sums.items()}
        return Observed(hidden, sums, torch.cat(self.n))


def _record(
    model: PreTrainedModel, spec: PatchSpec, fitted: set[tuple[int, str]], batches: Iterable[dict[str, Any]]
) -> dict[tuple[int, str], _Record]:
    """Runs the model on all batches at a lambda of 0, and records what the fitted slots need."""
    records = {key: _Record() for key in fitted}
    hidden: dict[int, Tensor] = {}
    handles: list[Any] = []
    for _, module in stacks_of(model)[0].modules.values():
        child, hook = child_of(module), gate_hook_of(module)
        if child is not None and hook is not None:
            layer = hook.layer
            handles.append(
                child.register_forward_pre_hook(lambda _, args, layer=layer: hidden.update({layer: args[0]}))
            )

    def observe(call: LayerCall, slot: str, problem: Problem) -> None:
        if (call.layer, slot) in records:
            records[call.layer, slot].add(hidden[call.layer], problem)

    attnswap.set_ramp(model, 0.0)
    count = 0
    try:
        with evaluating(model), observing(model, observe):
            for batch in tqdm(batches, desc="reading text to fit", unit="batch", disable=None):
                body_of(model)(**batch, use_cache=False)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
        follow(model, [spec])
    if not count:
        raise ConfigError("there is no text to fit the swaps to: give at least one batch")
    return records


def _fit_slot(model: PreTrainedModel, layer: int, name: str, record: _Record) -> float:
    """Sets the parameters of one slot, and returns the root mean square of the residuals."""
    child = child_of(stacks_of(model)[0].module(layer))
    assert child is not None
    slot, module = child.slots[name], child.get_submodule(name)
    values, residual = slot.swap.fit(record.observed())
    for parameter, value in values.items():
        module.get_parameter(parameter).copy_(value)
    return residual
