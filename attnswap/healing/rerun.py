"""Check that a rerun of a committed experiment reproduces its result."""

import json
import platform
from pathlib import Path
from typing import Any

from attnswap.errors import ConfigError, NumericsError
from attnswap.healing.comparable import recipe_differences
from attnswap.healing.experiment import Experiment
from attnswap.training.config import as_run


def read_committed(path: Path) -> dict[str, Any]:
    """Reads a committed result.

    Raises:
        ConfigError: The file is not a result of ``attnswap heal``.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        missing = {"recipe", "contexts", "protocol", "corpus", "data"} - result.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f'--check: "{path}" is not a result.json of attnswap heal: {error}') from None
    if missing:
        raise ConfigError(
            f'--check: "{path}" is not a result.json of attnswap heal: it lacks {", ".join(sorted(missing))}'
        )
    return result


def check_rerun(experiment: Experiment, committed: dict[str, Any]) -> None:
    """Checks, before anything is trained, that an experiment is the one of a committed result.

    Raises:
        ConfigError: The recipe, the text or the measurement differs.
    """
    protocol = committed["protocol"]
    compared = {
        "contexts": [sorted(experiment.contexts), sorted(protocol["contexts"])],
        "dtype": [str(experiment.dtype).removeprefix("torch."), protocol["dtype"]],
        "the text to measure on": [
            experiment.text_sha256,
            committed["corpus"]["sha256"],
        ],
    }
    scored = protocol["scored_tokens"]
    reached_end = protocol["first_token"] + scored == committed["corpus"]["tokens"]
    if experiment.max_tokens < scored or (experiment.max_tokens > scored and not reached_end):
        compared["max_tokens"] = [str(experiment.max_tokens), str(scored)]
    different = [f"recipe.{key}" for key in recipe_differences(as_run(experiment.config), committed["recipe"])]
    _refuse([*different, *(name for name, (ours, theirs) in compared.items() if ours != theirs)], committed)


def compare_with_committed(result: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Compares a result with a committed one.

    Args:
        result: The result of the rerun.
        committed: The committed result.

    Returns:
        A line of text for each context.

    Raises:
        NumericsError: A ratio to the control lies outside the committed 95% interval.
        ConfigError: The two were measured on different tokens, or trained on different text.
    """
    different = ["protocol"] if result["protocol"] != committed["protocol"] else []
    different += ["the training text"] if result["data"]["sha256"] != committed["data"]["sha256"] else []
    _refuse(different, committed)
    entries = {entry["context"]: entry["ratio_to_control"] for entry in committed["contexts"]}
    lines, outside = [], []
    for entry in result["contexts"]:
        known, found = entries[entry["context"]], entry["ratio_to_control"]["ratio"]
        said = f"context {entry['context']}: {found:.4f}, committed {known['lo']:.4f} to {known['hi']:.4f}"
        lines.append(said)
        outside += [] if known["lo"] <= found <= known["hi"] else [said]
    if outside:
        raise NumericsError(f"outside the committed interval: {'; '.join(outside)}")
    return lines


def _refuse(different: list[str], committed: dict[str, Any]) -> None:
    if different:
        python = committed.get("environment", {}).get("python", "unknown")
        raise ConfigError(
            f"--check: this is another experiment than that of the committed result: {', '.join(different)} differ. "
            f"The offline texts come with Python, which is {platform.python_version()} here and was {python} there"
        )
