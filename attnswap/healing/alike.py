"""Whether two runs were the same but for their swaps, so that one can be the control of the other."""

from dataclasses import asdict, replace
from typing import Any

from attnswap.errors import ConfigError
from attnswap.training.config import parse_config
from attnswap.training.stages import plan_of, without_swaps

RUN_KEYS = ("output_dir", "overwrite")
"""What says nothing about a result."""


def differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> list[str]:
    """Names the keys in which two recipes differ, but for where and how they run."""
    found: list[str] = []
    if not path and ours.get("swap") == "none":  # without a swap, lambda says nothing
        ours, theirs = as_control(ours), as_control(theirs)
    for key in sorted(ours.keys() | theirs.keys()):
        if (not path and key in RUN_KEYS) or key == "resume_from_checkpoint":
            continue
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key}")
    return found


def as_control(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe as far as it matters without a swap: its stages by their steps, and without those left out."""
    config = parse_config(values)
    kept = without_swaps(plan_of(config))
    stages = []
    for stage in kept:
        loss = replace(stage.section.loss, regression=0.0, sinks=0.0)
        section = asdict(replace(stage.section, ramp=None, loss=loss, share=1.0))
        stages.append({**section, "steps": stage.steps, "index": stage.index})
    training = {key: value for key, value in values["training"].items() if not kept or key != "max_steps"}
    optimizer = {key: value for key, value in values["optimizer"].items() if key != "swap_lr_multiplier"}
    return {**values, "stages": stages, "training": training, "optimizer": optimizer}


def check_alike(trained: dict[str, dict[str, Any]]) -> None:
    """Refuses a control that was trained on other text or by other batches than the healed model.

    Raises:
        ConfigError: The summaries of the two differ in what no recipe says.
    """
    if "control" not in trained:
        return
    healed, control = (
        {"sha256 of the text": summary["data"]["sha256"], "windows in a step": summary["windows_per_step"]}
        for summary in (trained["healed"], trained["control"])
    )
    different = [f"{key}: {healed[key]} and {control[key]}" for key in healed if healed[key] != control[key]]
    if different:
        raise ConfigError(
            f"the healed model and its control were not trained alike ({'; '.join(different)}): train both by as many "
            "processes and on the same text, in a new output_dir"
        )
