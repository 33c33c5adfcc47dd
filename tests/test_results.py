"""Every figure that the pages show is a committed one."""

import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml

from attnswap.errors import ConfigError, NumericsError
from attnswap.healing.leaderboard import PAGE, page, read_results, table
from attnswap.healing.report import markdown, within
from attnswap.training.config import parse_config

RESULTS = Path(__file__).parent.parent / "recipes" / "results"
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


def test_there_are_results() -> None:
    assert FOUND


@pytest.mark.parametrize("name", FOUND)
def test_a_result_is_complete_and_its_folder_holds_what_it_was_made_of(name: str) -> None:
    result, folder = FOUND[name], RESULTS / name
    jsonschema.validate(result, SCHEMA)
    parse_config(result["recipe"])
    for entry in result["contexts"]:
        ppl = entry["perplexity"]
        assert entry["ratio_to_control"]["ratio"] == pytest.approx(ppl["healed"] / ppl["control"], rel=1e-6)
        assert math.log(entry["ratio_to_control"]["ratio"]) == pytest.approx(entry["ratio_to_control"]["log_ratio"])
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
    assert markdown(result).split("\n\n")[1] in (folder / "README.md").read_text(), "the README shows another table"


@pytest.mark.parametrize("name", [n for n, r in FOUND.items() if n == r["swap"]["name"] and r["identity_start"]])
def test_a_swap_that_starts_as_the_model_was_costs_it_nothing(name: str) -> None:
    """The recipes that results are named after; what was tried on the way has folders of its own."""
    assert max(entry["ratio_to_control"]["log_hi"] for entry in FOUND[name]["contexts"]) <= 0.005


def test_the_leaderboard_is_made_of_the_results() -> None:
    assert (RESULTS / PAGE).read_text() == page(FOUND)
    assert table(FOUND).count("\n") == len(FOUND) + 1


def test_a_rerun_must_land_in_the_committed_interval(tmp_path: Path) -> None:
    def ratio(value: float) -> dict[str, float]:
        return {"ratio": value, "lo": value - 0.01, "hi": value + 0.01}

    def found(value: float, context: int = 512, **recipe: object) -> dict[str, object]:
        made = {"recipe": {"seed": 0, "output_dir": "out/here", **recipe}, "protocol": {"dtype": "float32"}}
        return {**made, "contexts": [{"context": context, "ratio_to_control": ratio(value)}]}

    committed = tmp_path / "result.json"
    committed.write_text(json.dumps(found(1.02)))
    assert "1.0250" in within(found(1.025, output_dir="out/there"), committed)[0]
    with pytest.raises(NumericsError, match="outside"):
        within(found(1.04), committed)
    with pytest.raises(ConfigError, match="did not measure"):
        within(found(1.02, 1024), committed)
    with pytest.raises(ConfigError, match="seed differ"):
        within(found(1.02, seed=1), committed)
    with pytest.raises(ConfigError, match="protocol differ"):
        within({**found(1.02), "protocol": {"dtype": "bfloat16"}}, committed)
    with pytest.raises(ConfigError, match="no result"):
        within(found(1.02), tmp_path / "absent.json")
