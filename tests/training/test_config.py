"""Recipes are strict: what is not meant is refused with the key's full path, and nothing but ConfigError escapes."""

import inspect
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import attnswap
from attnswap.errors import ConfigError
from attnswap.healing.comparable import control_recipe
from attnswap.healing.experiment import Experiment
from attnswap.training import load_config, parse_config
from attnswap.training.config import to_mapping
from attnswap.training.strict import MAX_BYTES, dump_yaml, parse_value, parse_yaml, read_yaml
from tests.helpers.paths import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BASE = {"output_dir": "out", "swap": "ssmax"}

SECTIONS = [
    "output_dir",
    "overwrite",
    "swap",
    "layers",
    "heads",
    "ramp",
    "model",
    "data",
    "training",
    "optimizer",
    "lora",
]
INSIDE = ["name", "form", "bias", "reference", "dtype", "source", "kind", "files", "sequence_length", "eval_fraction"]
INSIDE += ["learning_rate", "max_steps", "optim", "report_to", "fsdp_config", "r", "target_modules", "freeze", "seed"]
KEYS = st.sampled_from(SECTIONS + INSIDE)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
)
VALUES = st.recursive(
    SCALARS | KEYS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid_and_name_their_command(path: Path) -> None:
    config = load_config(path)
    assert (config.swap or {"name": "control"})["name"] == path.stem
    assert f"accelerate launch recipes/train.py recipes/{path.name}" in path.read_text()


def test_every_shipped_recipe_trains_on_the_same_data_as_the_control() -> None:
    assert len({repr(load_config(path).data) for path in RECIPES}) == 1
    assert {path.stem for path in RECIPES} <= {"control", *attnswap.swaps.names()}


HEALING = sorted((ROOT / "recipes" / "heal").glob("*.yaml"))


def control_of(path: Path) -> dict[str, Any]:
    experiment = Experiment(config=load_config(path, ["output_dir=out"]), out=Path("out"))
    return control_recipe(to_mapping(experiment.control_config))


@pytest.mark.parametrize("path", HEALING, ids=lambda path: path.stem)
def test_healing_recipes_are_valid_and_name_a_control_where_they_share_one(path: Path) -> None:
    config = load_config(path)
    assert (config.swap or {})["name"] == path.stem
    assert f"attnswap heal recipes/heal/{path.name}" in path.read_text()
    named = re.findall(r"--control out/heal/([\w-]+)/control", path.read_text())
    sharing = {other.stem for other in HEALING if other != path and control_of(other) == control_of(path)}
    assert len(named) == bool(sharing)
    assert set(named) <= sharing | {path.stem}


def test_healing_recipes_are_named_after_their_swaps() -> None:
    assert {path.stem for path in HEALING} <= set(attnswap.swaps.names())


def test_ssmax_and_control_differ_in_nothing_but_the_swap() -> None:
    by_name = {path.stem: to_mapping(load_config(path)) for path in RECIPES}
    different = {key for key in by_name["ssmax"] if by_name["ssmax"][key] != by_name["control"][key]}
    assert different == {"swap", "output_dir"}


def test_an_unquoted_no_is_the_strategy_of_that_name() -> None:
    text = "eval_strategy: no\nsave_strategy: no\nbf16: no"
    config = parse_config({**BASE, "training": parse_yaml(text, "a recipe")})
    assert config.training == {"eval_strategy": "no", "save_strategy": "no", "bf16": False}
    with pytest.raises(ConfigError, match=r"training\.eval_strategy: must be .* not True"):
        parse_config({**BASE, "training": parse_yaml("eval_strategy: yes", "a recipe")})


def test_a_resolved_recipe_reads_back() -> None:
    config = parse_config({**BASE, "lora": {"r": 4}, "training": {"learning_rate": "1e-4"}})
    assert parse_config(yaml.safe_load(yaml.safe_dump(to_mapping(config)))) == config
    assert config.training["learning_rate"] == 1e-4
    assert config.lora is not None
    assert config.lora.alpha == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainig": {}}, 'unknown key "trainig". Did you mean "training"?'),
        ({"training": {"max_step": 3}}, 'unknown key "training.max_step". Did you mean "training.max_steps"?'),
        ({"data": {"sequence_lenght": 3}}, 'unknown key "data.sequence_lenght". Did you mean "data.sequence_length"?'),
        ({"training": {"output_dir": "x"}}, "training.output_dir: cannot be set here: set output_dir at the top"),
        ({"training": {"use_cache": True}}, "training.use_cache: cannot be set here"),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: must be a finite number, not 'fast' (str)"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: must not be negative"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: must be a finite number"),
        ({"training": {"max_steps": True}}, "training.max_steps: must be a whole number, not True (bool)"),
        ({"training": {"bf16": 1}}, "training.bf16: must be true or false, not 1 (int)"),
        ({"training": {"max_steps": 0}}, "training.max_steps: must be positive"),
        ({"training": {"num_train_epochs": 0}}, "training.num_train_epochs: must be positive"),
        ({"training": {"per_device_train_batch_size": 0}}, "training.per_device_train_batch_size: must be at least 1"),
        ({"training": {"gradient_accumulation_steps": 0}}, "training.gradient_accumulation_steps: must be at least 1"),
        ({"training": {"seed": -1}}, "training.seed: must be at least 0"),
        ({"training": {"metric_for_best_model": "accuracy"}}, "training.metric_for_best_model: must be eval_loss"),
        ({"training": {"greater_is_better": True}}, "training.greater_is_better: must be false"),
        ({"training": {"lr_scheduler_type": "cosin"}}, 'unknown value "cosin". Did you mean "cosine"?'),
        ({"swap": "ssmx"}, 'unknown swap "ssmx". Did you mean "ssmax"?'),
        ({"swap": {"name": "ssmax", "fom": "affine"}}, 'has no option "fom". Did you mean "form"?'),
        ({"swap": {"name": "ssmax", "train_length": "x"}}, "train_length must be a whole number"),
        ({"heads": [0, "a"]}, "heads[1]: must be a whole number"),
        ({"ramp": 1.5}, "ramp: must lie between 0 and 1"),
        ({"model": "embedded"}, "model: must be a mapping"),
        ({"model": {"dtype": "float23"}}, "not 'float23' (str). Did you mean \"float32\"?"),
        ({"data": {"source": "files"}}, 'data.files: goes with "source: files"'),
        ({"data": {"kind": "chat"}}, "the offline text has no conversations"),
        ({"data": {"eval_fraction": 0}}, "data.eval_fraction: must lie between 0 and 1"),
        ({"swap": "none", "layers": [0]}, "layers, heads: leave them out"),
        ({"optimizer": {"freeze": "all_but_swap"}, "lora": {}}, "lora: needs"),
        ({"output_dir": 3}, "output_dir: must be a text"),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({**BASE, **changes})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match='missing key "output_dir"'):
        parse_config({"swap": "ssmax"})


def test_overrides() -> None:
    overrides = ["training.max_steps=7", "swap.form=scale", "lora.r=3", "layers='1:'", "data.eval_windows=null"]
    config = parse_config(BASE, overrides)
    assert config.training == {"max_steps": 7}
    assert config.swap == {"name": "ssmax", "form": "scale"}
    assert config.lora is not None
    assert config.lora.r == 3
    assert config.layers == "1:"
    assert config.data.eval_windows is None
    assert BASE == {"output_dir": "out", "swap": "ssmax"}


def test_an_override_reaches_into_a_list() -> None:
    stages: list[dict[str, Any]] = [{"name": "first", "share": 0.5}, {"name": "second", "share": 0.5}]
    base = {**BASE, "stages": stages, "training": {"max_steps": 9}}
    config = parse_config(base, ["stages.1.ramp.over=0.25", "stages.0.share=0.7"])
    assert [stage.share for stage in config.stages] == [0.7, 0.5]
    assert config.stages[1].ramp is not None and config.stages[1].ramp.over == 0.25
    assert "ramp" not in stages[1], "the recipe given was changed"
    for wrong in ("stages.2.share=1", "stages.-1.share=1", "stages.first.share=1"):
        with pytest.raises(ConfigError, match="is not an index of the list"):
            parse_config(base, [wrong])


@pytest.mark.parametrize("override", ["training", "=3", "a..b=1", "output_dir.x=1", "ramp=[", "swap=*a", "nothing=1"])
def test_bad_overrides(override: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(BASE, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", "line 2: aliases (*x) are not allowed"),
        ("a: 1\nb: {c: 1, c: 2}", 'line 2: the key "c" is given twice'),
        ("[" * 40 + "]" * 40, "nested more than"),
        ("a: [1", "not valid YAML"),
        ("!!python/object/apply:os.system [echo]", "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("a: !!int ''", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_yaml(text, "recipe")


NUMBERS: dict[str, Any] = {
    **{"10": 10, "-3": -3, "+3": 3, "010": 10, "0": 0, "0x1F": 31, "0o17": 15, "08": 8},
    **{"1e-4": 1e-4, "1E5": 1e5, "1.5": 1.5, ".5": 0.5, "-1.": -1.0, "1.0e+3": 1e3, "-.inf": -float("inf")},
    **{text: text for text in ("1:10", "4:8", "-1:30", "1:2:3", "190:20:30.15", "1_000", "0b101", "1e", "0x", "12a")},
    **{"true": True, "null": None, "no": False, "2:3:": "2:3:"},
}
"""What YAML says and what is meant: numbers are those of YAML 1.2 and JSON, not sexagesimal and not octal."""


@pytest.mark.parametrize("text", [text for text in NUMBERS if not text.endswith(":")])
@pytest.mark.parametrize("form", ["{}", "[{}]", "{{a: {}}}", "- {}", "a: {}"])
def test_numbers_are_those_of_json(text: str, form: str) -> None:
    found = parse_yaml(form.format(text), "recipe")
    while isinstance(found, list | dict):
        found = found[0] if isinstance(found, list) else found["a"]
    assert found == NUMBERS[text] and type(found) is type(NUMBERS[text])
    assert parse_value(text, "recipe") == NUMBERS[text]


@pytest.mark.parametrize("layers", ["1:10", "4:8", "2:", "8:", ":4", "::2", "-4:", "1:10:2", ":", "1:59:59", "'1:10'"])
def test_slices_of_layers_are_text(layers: str, tmp_path: Path) -> None:
    """On the command line as they are; in a file YAML wants those in quotes that end in a colon."""
    assert parse_config(BASE, [f"layers={layers}"]).layers == layers.strip("'")
    if not layers.endswith(":"):
        (tmp_path / "recipe.yaml").write_text(f"output_dir: out\nswap: ssmax\nlayers: {layers}\n")
        assert load_config(tmp_path / "recipe.yaml").layers == layers.strip("'")


@pytest.mark.parametrize(
    "value", [*NUMBERS, *NUMBERS.values(), 1e-5, 1e300, 10**18, "", " ", "a: b", "*a", "1970-01-01"]
)
def test_what_is_written_is_read_back(value: Any) -> None:
    """By this reader and by those of YAML 1.1, which a user may have."""
    for values in ({"a": value}, {"a": [value]}, {str(value): 1}):
        assert parse_yaml(dump_yaml(values), "recipe") == values
        assert yaml.safe_load(dump_yaml(values)) == values


@pytest.mark.parametrize(
    "text",
    [
        "ramp: 0x" + "f" * 5000,
        "training: {max_steps: 0x" + "f" * 5000 + "}",
        "ramp: " + "9" * 5000,
        "ramp: !!int '" + "1:" * 5000 + "1'",
        "ramp: !!float '" + "1:" * 5000 + "1'",
        "ramp: 1" + ":59" * 10000,
        "heads:\n" + "- 1\n" * 8000,
        "heads: [" + "1," * 16000 + "]",
        "swap: {" + ",".join(f"a{i}: 1" for i in range(3000)) + "}",
        "training: {" + ",".join(f"a{i}: 1" for i in range(3000)) + "}",
        "ramp: " + "[" * 20000,
        "swap: '" + "a" * 30000 + "'",
        "? " + "a" * 30000 + "\n: 1",
        "".join(f"k{i}: {i}\n" for i in range(3000)),
        "- " * 10000,
        "ramp: " + "1.5e3" * 6000,
        "a" * (MAX_BYTES + 1),
        "é" * (MAX_BYTES // 2 + 10),
    ],
)
def test_long_recipes_take_no_time(text: str, tmp_path: Path) -> None:
    """Whatever they hold."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: out\n{text}", encoding="utf-8")
    start = time.process_time()
    with pytest.raises(ConfigError):
        load_config(path)
    assert time.process_time() - start < 2


HUGE: dict[str, Any] = {
    "plus": 16**5000,
    "minus": -(16**5000),
    "list": [16**5000],
    "mapping": {"a": 16**5000},
    "64 bits": 1 << 63,
}


@pytest.mark.parametrize("kind", HUGE)
@pytest.mark.parametrize("place", [("ramp",), ("heads",), ("training", "max_steps"), ("data", "seed"), ("output_dir",)])
def test_numbers_too_long_to_print_are_refused(place: tuple[str, ...], kind: str) -> None:
    value = HUGE[kind]
    changes: Any = {place[-1]: value} if len(place) == 1 else {place[0]: {place[1]: value}}
    with pytest.raises(ConfigError):
        parse_config({**BASE, **changes})


def test_files_that_are_refused(tmp_path: Path) -> None:
    big, binary = tmp_path / "big.yaml", tmp_path / "binary.yaml"
    big.write_bytes(b"#" * (MAX_BYTES + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in ((big, "larger than 32 kB"), (binary, "not a UTF-8"), (tmp_path / "no.yaml", "cannot read")):
        with pytest.raises(ConfigError, match=message):
            read_yaml(path)
    with pytest.raises(ConfigError, match="must be a mapping"):
        parse_config(["a list"])


@settings(max_examples=300, deadline=None)
@given(VALUES, st.lists(st.text(max_size=12) | st.builds("{}={}".format, KEYS, st.text(max_size=8)), max_size=2))
def test_any_values_give_a_recipe_or_a_config_error(values: Any, overrides: list[str]) -> None:
    for mapping in (values, {**BASE, **values} if isinstance(values, dict) else {**BASE, "training": values}):
        with suppress(ConfigError):  # anything else would fail the test
            parse_config(mapping, overrides)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="utf-8") | st.sampled_from("&*!{}[]:-#|>'\"\n ?,%@~=0"), max_size=40))
def test_any_text_parses_or_is_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        parse_yaml(text, "recipe")


def test_a_reporter_that_is_not_installed(tmp_path):
    from attnswap.training.inputs import training_arguments

    config = parse_config({**BASE, "training": {"report_to": "wandb"}})
    with pytest.raises(ConfigError, match="wandb is not installed"):
        training_arguments(config, tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    """accelerate refuses keys it does not know; DeepSpeed's options are compared with accelerate's own names."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DeepSpeedPlugin

    config = load_config_from_file(str(path))
    assert config.mixed_precision in ("bf16", "no")
    known = set(inspect.signature(DeepSpeedPlugin).parameters) | {"deepspeed_config_file"}
    assert set(getattr(config, "deepspeed_config", {}) or {}) <= known


@pytest.mark.slow
def test_the_scaling_page_shows_what_its_script_prints():
    printed = subprocess.run(
        [sys.executable, "recipes/scaling.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() in (ROOT / "docs" / "scaling.md").read_text()
