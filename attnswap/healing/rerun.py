"""Reruns of committed results: of the same recipe, on the same text, within their intervals."""

import json
import platform
from pathlib import Path
from typing import Any

from attnswap.errors import ConfigError, NumericsError
from attnswap.healing.alike import differences
from attnswap.healing.experiment import Experiment
from attnswap.training.config import as_run


def read_committed(path: Path) -> dict[str, Any]:
    """Returns a committed result.

    Raises:
        ConfigError: The file is none.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        missing = {"recipe", "contexts", "protocol", "corpus", "data"} - result.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f'--check: "{path}" is no result of attnswap heal: {error}') from None
    if missing:
        raise ConfigError(f'--check: "{path}" is no result of attnswap heal: it has no {", ".join(sorted(missing))}')
    return result


def check_rerun(experiment: Experiment, committed: dict[str, Any]) -> None:
    """Refuses, before anything is trained, what can be told by then not to be comparable with a committed result.

    Raises:
        ConfigError: The recipe, the text or the measurement is another one.
    """
    protocol = committed["protocol"]
    asked = {
        "contexts": [sorted(experiment.contexts), sorted(protocol["contexts"])],
        "dtype": [str(experiment.dtype).removeprefix("torch."), protocol["dtype"]],
        "the text to measure on (another Python has another language reference)": [
            experiment.text_sha256,
            committed["corpus"]["sha256"],
        ],
    }
    scored = protocol["scored_tokens"]
    whole = protocol["first_token"] + scored == committed["corpus"]["tokens"]
    if experiment.max_tokens < scored or (experiment.max_tokens > scored and not whole):
        asked["max_tokens"] = [str(experiment.max_tokens), str(scored)]
    different = [f"recipe.{key}" for key in differences(as_run(experiment.config), committed["recipe"])]
    _refuse([*different, *(name for name, (ours, theirs) in asked.items() if ours != theirs)], committed)


def within(result: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """Compares a result with a committed one.

    Args:
        result: What was found.
        committed: What was found before.

    Returns:
        A line for each context.

    Raises:
        NumericsError: A ratio to the control lies outside the committed 95% interval.
        ConfigError: They were not measured on the same tokens, or not trained on the same text.
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
            f"--check: not what the committed result is of: {', '.join(different)} differ (the offline texts are those "
            f"of the running Python, {platform.python_version()} here and {python} there)"
        )
