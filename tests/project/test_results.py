"""Every figure that the pages show is a committed one."""

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

from attnswap.errors import ConfigError, NumericsError
from attnswap.healing.comparable import recipe_differences
from attnswap.healing.experiment import Experiment
from attnswap.healing.leaderboard import PAGE, page, read_results, table
from attnswap.healing.report import markdown
from attnswap.healing.rerun import check_rerun, compare_with_committed, read_committed
from attnswap.training.config import as_run, load_config, parse_config
from tests.helpers.paths import ROOT

RESULTS = ROOT / "results"
FOUND = read_results(RESULTS)
RATIO = {
    "type": "object",
    "required": ["ratio", "lo", "hi", "log_ratio", "log_lo", "log_hi"],
    "additionalProperties": {"type": "number"},
}
SCHEMA = {
    "type": "object",
    "required": ["schema", "swap", "command", "commit", "seed", "recipe", "data", "tokens", "seconds", "contexts"],
    "properties": {
        "commit": {"type": "string", "pattern": "^[0-9a-f]{40}$"},
        "tokens": {"type": "integer", "minimum": 1},
        "data": {"required": ["source", "sha256", "documents"]},
        "contexts": {
            "type": "array",
            "minItems": 1,
            "items": {
                "required": ["context", "perplexity", "ratio_to_control", "ratio_to_original", "bypassed_to_healed"],
                "properties": {"ratio_to_control": RATIO, "ratio_to_original": RATIO},
            },
        },
        "proof_of_use": {"required": ["cost_of_bypass", "movement", "used"]},
    },
}


def test_every_swap_of_the_recipes_has_a_result() -> None:
    recipes = {path.stem for path in (ROOT / "recipes" / "heal").glob("*.yaml")}
    assert recipes <= {name for name, result in FOUND.items() if name == result["swap"]["name"]}


@pytest.mark.parametrize("name", FOUND)
def test_a_result_is_complete_and_its_folder_holds_what_it_was_made_of(name: str) -> None:
    result, folder = FOUND[name], RESULTS / name
    jsonschema.validate(result, SCHEMA)
    parse_config(result["recipe"])
    for entry in result["contexts"]:
        ppl = entry["perplexity"]
        assert entry["ratio_to_control"]["ratio"] == pytest.approx(ppl["healed"] / ppl["control"], rel=1e-6)
        assert math.log(entry["ratio_to_control"]["ratio"]) == pytest.approx(entry["ratio_to_control"]["log_ratio"])
        if entry["recovered_fraction"] is not None:
            back, lost = (math.log(ppl["unhealed"] / ppl[name]) for name in ("healed", "control"))
            assert entry["recovered_fraction"] == pytest.approx(back / lost)
    assert {"README.md", "result.json", "result.md", "result.png", "recipe.yaml", "steps.jsonl"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "result.md").read_text() == markdown(result)
    ran = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert ran | {"output_dir": result["recipe"]["output_dir"]} == result["recipe"]
    logged = [json.loads(line) for line in (folder / "steps.jsonl").open()]
    curve = {point["step"]: point["loss"] for point in result["curve"]}
    assert curve == {entry["step"]: entry["loss"] for entry in logged if "loss" in entry}
    assert f"    {result['command']}\n" in (folder / "README.md").read_text(), "the README shows another command"
    shown = " ".join((folder / "README.md").read_text().split())
    for part in markdown(result).split("\n\n")[1:]:
        assert " ".join(part.split()) in shown, "the README shows other figures"


@pytest.mark.parametrize("name", [n for n, r in FOUND.items() if n == r["swap"]["name"] and r["identity_start"]])
def test_a_swap_that_starts_as_the_model_was_costs_it_nothing(name: str) -> None:
    """The recipes that results are named after; what was tried on the way has folders of its own."""
    assert max(entry["ratio_to_control"]["log_hi"] for entry in FOUND[name]["contexts"]) <= 0.005


def test_softpick_is_healed_in_every_layer() -> None:
    result = FOUND["softpick"]
    assert (result["layers"], result["heads"]) == (None, None)
    assert result["tokens"] <= 1_000_000
    ratios = {entry["context"]: entry["ratio_to_control"]["ratio"] for entry in result["contexts"]}
    assert set(ratios) == {512, 1024, 2048, 4096, 8192}
    assert ratios[512] <= 1.005
    assert max(ratios.values()) <= 1.01
    assert result["structure"]["healed"]["sink_rate"] < 0.01
    assert result["proof_of_use"]["used"]


def numbers(value: Any) -> list[float]:
    """Every number in a result, those in what it says too, and how far ratios are above or below 1."""
    if isinstance(value, str):
        return [float(figure) for figure in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", value)]
    if isinstance(value, dict) and isinstance(value.get("ratio"), float):
        return [value["ratio"] - 1, *numbers(list(value.values()))]
    if isinstance(value, dict | list):
        return [x for part in (value.values() if isinstance(value, dict) else value) for x in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


HEALING = "docs/healing.md"
OTHERS = sorted(str(path.relative_to(ROOT)) for path in RESULTS.rglob("README.md"))
UNITS = (1.0, 1e3, 1e-6, 2**-20)
"""Seconds are shown as milliseconds too, bytes as MB and MiB."""


@pytest.mark.parametrize("page", [HEALING, *OTHERS])
def test_figures_in_prose_are_committed(page: str) -> None:
    """Those of a result's page are its own, those of a paragraph of healing.md of the results that it names."""
    file = ROOT / page
    whole = re.sub(r"```.*?```|^    .*?$", "", file.read_text(), flags=re.S | re.M)
    healed = page == HEALING or file.parent.name in FOUND
    whole = re.sub(r"^\|.*?$", "", whole, flags=re.M) if healed else whole  # tables are compared above
    for part in re.split(r"\n\n|\n(?=- )", whole) if page == HEALING else [whole]:
        named = [RESULTS / name for name in re.findall(r"results/([\w-]+)/", part)]
        folders = named if page == HEALING else [file.parent]
        known = [abs(x) for folder in folders for path in folder.rglob("*.json") for x in numbers(read(path))]
        text = re.sub(r"`[^`]*`|\]\([^)]*\)", "", part)
        figures = re.findall(r"(\d+\.\d+(?:e-?\d+)?)( ?%| percent)?", text)
        powers = any("e" in figure for figure, _ in figures)  # of ten, in front of which two digits stand
        rounded = {(float(f"{x:.2g}"), "") for x in known} if powers or not healed else set()
        for places, percent in {(len(figure.partition(".")[2]), percent) for figure, percent in figures}:
            units = (1.0, 100.0) if percent else (1.0,) if healed else UNITS
            rounded |= {(float(f"{x * unit:.{places}f}"), percent) for x in known for unit in units}
        for figure, percent in figures:
            assert (float(figure), percent) in rounded, f"{figure} stands in no result that {page} names there"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_leaderboard_is_made_of_the_results() -> None:
    assert (RESULTS / PAGE).read_text() == page(FOUND)
    assert table(FOUND).count("\n") == len(FOUND) + 1


def made(value: float, context: int = 512) -> dict[str, Any]:
    ratio = {"ratio": value, "lo": value - 0.01, "hi": value + 0.01}
    return {
        "recipe": as_run(RECIPE),
        "protocol": {"dtype": "float32", "contexts": [context], "first_token": 8, "scored_tokens": 92},
        "corpus": {"sha256": hashlib.sha256(b"text").hexdigest(), "tokens": 200},
        "data": {"sha256": "b"},
        "contexts": [{"context": context, "ratio_to_control": ratio}],
    }


RECIPE = parse_config({"output_dir": "out", "model": {"reference": "embedded"}, "swap": "softpick"})


def test_a_rerun_must_land_in_the_committed_interval() -> None:
    assert "1.0250" in compare_with_committed(made(1.025), made(1.02))[0]
    with pytest.raises(NumericsError, match="outside"):
        compare_with_committed(made(1.04), made(1.02))
    with pytest.raises(ConfigError, match="training text differ"):
        compare_with_committed({**made(1.02), "data": {"sha256": "c"}}, made(1.02))
    with pytest.raises(ConfigError, match="protocol differ"):
        compare_with_committed({**made(1.02), "protocol": {"scored_tokens": 91}}, made(1.02))


def test_a_rerun_of_something_else_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path, "contexts": (512,), "dtype": torch.float32, "text": "text"}
    options["max_tokens"] = 92
    check_rerun(Experiment(replace(RECIPE, output_dir="elsewhere"), **options), made(1.02))
    for config, changes, words in (
        (replace(RECIPE, layers="1:"), {}, "recipe.layers"),
        (RECIPE, {"contexts": (512, 1024)}, "contexts"),
        (RECIPE, {"dtype": torch.bfloat16}, "dtype"),
        (RECIPE, {"max_tokens": 91}, "max_tokens"),
        (RECIPE, {"max_tokens": 93}, "max_tokens"),
        (RECIPE, {"text": "another"}, "the text to measure on"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_rerun(Experiment(config, **{**options, **changes}), made(1.02))
    for content in ("{}", "[]", "not json"):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ConfigError, match="is not a result"):
            read_committed(tmp_path / "result.json")
    with pytest.raises(ConfigError, match="is not a result"):
        read_committed(tmp_path / "absent.json")


def test_the_recipe_that_results_smoke_runs_is_the_committed_one() -> None:
    ran = load_config(ROOT / "recipes" / "smoke" / "softpick.yaml")
    assert not recipe_differences(as_run(ran), FOUND["smoke"]["recipe"])
