"""Whether two runs differ only in their swaps, so that one can be the control of the other."""

from dataclasses import asdict, replace
from typing import Any

from attnswap.errors import ConfigError
from attnswap.training.config import parse_config
from attnswap.training.stages import control_stages, stages_of

RUN_KEYS = ("output_dir", "overwrite")
"""Keys of a recipe that do not influence its result."""


def recipe_differences(ours: dict[str, Any], theirs: dict[str, Any], path: str = "") -> list[str]:
    """Returns the keys in which two recipes differ, apart from :data:`RUN_KEYS`.

    Args:
        ours: A recipe as plain values.
        theirs: The other recipe.
        path: Dotted path of the two mappings in their recipes, ending in a dot.
    """
    found: list[str] = []
    if not path and ours.get("swap") == "none":  # without a swap, lambda has no effect
        ours, theirs = control_recipe(ours), control_recipe(theirs)
    for key in sorted(ours.keys() | theirs.keys()):
        if (not path and key in RUN_KEYS) or key == "resume_from_checkpoint":
            continue
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += recipe_differences(a, b, f"{path}{key}.")
        elif a != b:
            found.append(f"{path}{key}")
    return found


def control_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe reduced to what matters without a swap.

    Stages that train only swaps are left out, shares become numbers of steps, ramps and losses on swaps are removed.
    """
    config = parse_config(values)
    kept = control_stages(stages_of(config))
    stages = []
    for stage in kept:
        loss = replace(stage.section.loss, regression=0.0, sinks=0.0)
        section = asdict(replace(stage.section, ramp=None, loss=loss, share=1.0))
        stages.append({**section, "steps": stage.steps, "index": stage.index})
    training = {key: value for key, value in values["training"].items() if not kept or key != "max_steps"}
    optimizer = {key: value for key, value in values["optimizer"].items() if key != "swap_lr_multiplier"}
    return {**values, "stages": stages, "training": training, "optimizer": optimizer}


def check_same_training(trained: dict[str, dict[str, Any]]) -> None:
    """Checks that a control was trained on the same text and with the same batch size as the healed model.

    Args:
        trained: The summaries of the runs ``healed`` and, if there is one, ``control``.

    Raises:
        ConfigError: The two differ.
    """
    if "control" not in trained:
        return
    healed, control = (
        {"sha256 of the text": summary["data"]["sha256"], "windows per step": summary["windows_per_step"]}
        for summary in (trained["healed"], trained["control"])
    )
    different = [f"{key}: {healed[key]} and {control[key]}" for key in healed if healed[key] != control[key]]
    if different:
        raise ConfigError(
            f"the healed model and its control were trained differently ({'; '.join(different)}): train both with the "
            "same number of processes and on the same text, in a new output_dir"
        )
