"""Patched models: moved away from identity, compared with the oracle, and searched for what a patch left behind."""

import numpy as np
import torch
from torch import Tensor, nn

from attnswap.surgery.module import child_of
from attnswap.surgery.stacks import find_stack
from tests.helpers.oracle import expected, recording
from tests.helpers.tiny_models import VOCABULARY, WINDOW

LENGTH = 20


@torch.no_grad()
def move_away(model: nn.Module, length: int, seed: int = 1) -> None:
    """Moves every swap parameter away from identity.

    Per-token features get a standard deviation near 1 and the forgetting gate a half-life near half the length;
    ln n gets a coefficient that makes a wrong n visible.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor, scale: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * scale

    for _, module in find_stack(model).modules.values():
        child = child_of(module)
        if child is None:
            continue
        for slot in child.children():
            for name, p in slot.named_parameters():
                if name == "gain":  # log f = gain * logsigmoid(x): about ln(1/2) after half the length
                    p.copy_(0.69 / (length / 2) / 0.69 * (1 + noise(p, 0.2).abs()))
                elif name.endswith("weight"):
                    p.copy_(noise(p, 1 / p.shape[-1] ** 0.5))
                elif name in ("scale", "position_gain"):
                    p.copy_(0.7 + noise(p, 0.2))
                else:
                    p.copy_(p + noise(p, 0.5))


def layout(name, length=LENGTH):
    """Input of two rows: tokens, attention mask, position ids, document numbers (None: not passed to the model)."""
    generator = torch.Generator().manual_seed(11)
    ids = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    mask, documents = torch.ones_like(ids), torch.zeros_like(ids)
    given = {"input_ids": ids}
    if name == "left":
        mask[1, :7] = 0
        given["attention_mask"] = mask
    elif name == "interior":
        mask[0, 5:8], mask[1, 12:15] = 0, 0
        given["attention_mask"] = mask
    elif name == "packed":
        documents[0, 8:], documents[1, 3:11], documents[1, 11:] = 1, 1, 2
        starts = torch.stack([torch.tensor([min(np.flatnonzero(row == d)) for d in row]) for row in documents.numpy()])
        given["position_ids"] = torch.arange(length) - starts
        given["use_cache"] = False
    if name in ("left", "interior"):
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return given, mask.numpy().astype(bool), documents.numpy()


def window_of(model, layer):
    types = getattr(model.config, "layer_types", None)
    if types is not None:
        return WINDOW if types[layer] == "sliding_attention" else None
    return getattr(model.config, "sliding_window", None)


def slots_of(module):
    child = child_of(module)
    return [
        (
            s.swap,
            s.heads,
            s.ramp,
            {k: p.detach().double().numpy() for k, p in child.get_submodule(n).named_parameters()},
        )
        for n, s in (child.slots.items() if child is not None else [])
    ]


def check_layers(model, name, tolerance=1e-5):
    given, mask, documents = layout(name)
    with torch.no_grad(), recording(model) as calls:
        logits = model(**given).logits
    for layer, (_, module) in find_stack(model).modules.items():
        out, _ = expected(calls[layer], slots_of(module), mask, documents, window_of(model, layer))
        worst = np.abs(calls[layer].out - out)[mask].max()
        assert worst < tolerance, f"layer {layer} {name}: {worst}"
    return logits, torch.tensor(mask)


def snapshot(model):
    """Everything a patch could leave behind, module by module."""
    traces = {}
    for name, module in model.named_modules():
        kept = {k: v for k, v in module.__dict__.items() if not isinstance(v, torch.nn.Module)}
        traces[name] = {k: (repr(v) if not isinstance(v, dict) else sorted(map(str, v))) for k, v in kept.items()}
    return traces, model.config.to_dict(), model.config._attn_implementation, list(model.state_dict())
