"""Damaged entries of config.json and of adapters: refused by our errors, soon, on every way of loading."""

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTJConfig, PreTrainedModel

import attnswap
from attnswap.errors import AttnSwapError, CheckpointError, ConfigError
from attnswap.surgery.spec import PatchSpec, Slot, read_entry
from tests.helpers.tiny_models import tiny

ENTRY: dict[str, Any] = {
    "format": 2,
    "before": "sdpa",
    "seam": "interface",
    "part": None,
    "swaps": [
        {"slot": "softpick", "swap": {"name": "softpick"}, "layers": [0, 1], "heads": [0, 2], "ramp": 1.0},
        {"slot": "softpick_1", "swap": {"name": "softpick"}, "layers": [0], "heads": [1, 3], "ramp": [0.5, 1]},
    ],
}

NO_INDICES: list[Any] = [
    *([], None, "0", 0, {}, [0, 0], [1, 0, 1], [-2], [0.0], [0.9], [True], [None], ["0"], [[0]], [10**30, 10**30]),
]
NO_LAMBDAS: list[Any] = [
    *(
        None,
        True,
        "1",
        -0.1,
        1.5,
        float("nan"),
        float("inf"),
        [0.5, "1"],
        [0.5, None],
        [0.5, True],
        [[1.0]],
        {},
        10**400,
    ),
]
NO_SLOTS: list[Any] = [
    *("", "a.b", "a b", "1st", "forward", "info", "slots", "training", "add", "__class__", "_modules", "type"),
    *("original_module", "modules_to_save", None, 1, ["a"], "a\n"),
]
NO_SWAPS: list[Any] = [
    *(None, 1, [], {}, "nothing", {"name": "nothing"}, {"name": ["softpick"]}, {"name": "softpick", "no": 1}),
    *({"name": "softpick", "eps": "1"}, {"name": "softpick", "eps": [1]}, {"name": "softpick", "eps": 10**400}),
    *({"name": "sigmoid", "bias": "predicted", "units": size} for size in (-1, 10**9, 10**18, 10**40, 1e9, True)),
    *({"name": "entmax", "scale": "predicted", "units": size} for size in (10**9, 10**18)),
]
DAMAGES: list[tuple[str, Any]] = [
    *(("layers", value) for value in NO_INDICES),
    *(("heads", value) for value in NO_INDICES if value is not None),
    *(("ramp", value) for value in NO_LAMBDAS),
    *(("slot", value) for value in NO_SLOTS),
    *(("swap", value) for value in NO_SWAPS),
]
WHOLE: list[tuple[str, Any]] = [
    *(("format", value) for value in (None, 0, 3, 1.0, True, "2", [])),
    *(("before", value) for value in (None, "", 1, ["sdpa"])),
    *(("seam", value) for value in (None, "", "other", 1, ["interface"])),
    *(("part", value) for value in (0, True, ["cross"], {})),
    *(("swaps", value) for value in (None, 1, "swaps", {"a": 1}, [None], [1], ["a"], [[]], [{}])),
]


def read(entry: dict[str, Any]) -> None:
    start = time.process_time()
    with pytest.raises(CheckpointError):
        PatchSpec.from_dict(entry)
    assert time.process_time() - start < 2


def test_the_entry_is_sound_as_it_is():
    assert PatchSpec.from_dict(PatchSpec.from_dict(ENTRY).to_dict()) == PatchSpec.from_dict(ENTRY)
    assert PatchSpec.from_dict({**ENTRY, "swaps": []}).layers == {}  # what adapters leave that are all disabled


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("key", "value"), DAMAGES)
def test_a_damaged_swap_is_refused(place: int, key: str, value: Any):
    entry = copy.deepcopy(ENTRY)
    entry["swaps"][place][key] = value
    read(entry)


@pytest.mark.parametrize("key", ["slot", "swap", "layers", "heads", "ramp"])
def test_nothing_may_be_missing_from_a_swap(key: str):
    entry = copy.deepcopy(ENTRY)
    del entry["swaps"][0][key]
    read(entry)


@pytest.mark.parametrize(("key", "value"), WHOLE)
def test_a_damaged_entry_is_refused(key: str, value: Any):
    read({**ENTRY, key: value})


@pytest.mark.parametrize("key", list(ENTRY))
def test_nothing_may_be_missing(key: str):
    read({k: v for k, v in ENTRY.items() if k != key})


@pytest.mark.parametrize("first", [[0, 1], [3], None])
@pytest.mark.parametrize("second", [[1, 3], None])
@pytest.mark.parametrize("layers", [[0], [5, 1]])
def test_two_swaps_never_serve_one_head(first: Any, second: Any, layers: list[int]):
    entry = copy.deepcopy(ENTRY)
    entry["swaps"][0]["heads"], entry["swaps"][1] = first, {**entry["swaps"][1], "heads": second, "layers": layers}
    read(entry)


@pytest.mark.parametrize("heads", [[0, 2], [1, 3]])
def test_a_layer_has_no_two_slots_of_one_name(heads: list[int]):
    entry = copy.deepcopy(ENTRY)
    entry["swaps"][1] |= {"slot": "softpick", "heads": heads}
    read(entry)


def gptj() -> PreTrainedModel:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}
    return AutoModelForCausalLM.from_config(GPTJConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"llama": tiny, "gptj": gptj}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A patched checkpoint of each seam."""
    folders = {}
    for name, make in MODELS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model = make()
        attnswap.patch(model, {"name": "sigmoid", "bias": "predicted", "units": 4})
        model.save_pretrained(folders[name])
    return folders


def swap_of(values: dict[str, Any]) -> dict[str, Any]:
    return values["attnswap"]["swaps"][0]


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown implementation": lambda c: c["attnswap"].update(before="x"),
    "itself before": lambda c: c["attnswap"].update(before="attnswap"),
    "no seam": lambda c: c["attnswap"].update(format=2) or c["attnswap"].pop("seam", None),
    "units 10^18": lambda c: swap_of(c)["swap"].update(units=10**18),
    "heads twice": lambda c: swap_of(c).update(heads=[0, 0, 0, 0]),
    "layer beyond": lambda c: swap_of(c).update(layers=[0, 7]),
    "head beyond": lambda c: swap_of(c).update(heads=[0, 4]),
    "lambda of too few": lambda c: swap_of(c).update(ramp=[0.5, 0.5]),
    "half a group": lambda c: swap_of(c).update(
        swap={"name": "forgetting-gate", "init": "identity"}, slot="forgetting_gate", heads=[1, 2]
    ),
    "a group apart": lambda c: swap_of(c).update(
        swap={"name": "forgetting-gate", "init": "identity"}, slot="forgetting_gate", ramp=[0.1, 0.2, 0.3, 0.4]
    ),
    "not bound": lambda c: swap_of(c).update(swap={"name": "sigmoid"}),
    "empty": lambda c: c.update(attnswap={}),
}
OURS_ALONE: dict[str, Callable[[dict[str, Any]], object]] = {
    "other shapes": lambda c: swap_of(c)["swap"].update(units=7),
    "a tower that is none": lambda c: c.update(text_config={"attnswap": {}}),
    "towers of text": lambda c: c.update(text_config="attnswap"),
    "another seam": lambda c: c["attnswap"].update(
        format=2, part=None, seam="interface" if c["attnswap"].get("seam") == "scores" else "scores", before="eager"
    ),
    "hidden size 10^12": lambda c: c.update(hidden_size=10**12, n_embd=10**12),
}
"""Transformers' own loaders give errors of transformers and torch for these, before attnswap is asked."""


def edited(source: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Makes a copy of a checkpoint with another config."""
    values = json.loads((source / "config.json").read_text())
    edit(values)
    (target / "config.json").write_text(json.dumps(values))
    (target / "model.safetensors").symlink_to(source / "model.safetensors")
    return target


@pytest.mark.parametrize(
    "loader", [attnswap.from_pretrained, AutoModelForCausalLM.from_pretrained], ids=["own", "auto"]
)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("edit", EDITS)
def test_a_damaged_config_is_refused(saved: Any, tmp_path: Path, edit: str, name: str, loader: Any):
    if name == "gptj" and "group" in edit:
        pytest.skip("its query heads share no keys")
    folder = edited(saved[name], tmp_path, EDITS[edit])
    start = time.process_time()
    with pytest.raises(CheckpointError):
        loader(folder)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("edit", OURS_ALONE)
def test_what_transformers_cannot_read_is_one_of_our_errors(saved: Any, tmp_path: Path, edit: str, name: str):
    folder = edited(saved[name], tmp_path, OURS_ALONE[edit])
    start = time.process_time()
    with pytest.raises(AttnSwapError):
        attnswap.from_pretrained(folder)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("names", [[1], "AttnSwapX", None, [None, "AttnSwapX"], {"a": 1}])
def test_architectures_that_are_no_names_do_no_harm(saved: Any, tmp_path: Path, names: Any, name: str):
    folder = edited(saved[name], tmp_path, lambda c: c.update(architectures=names))
    try:
        model = attnswap.from_pretrained(folder)
    except CheckpointError:
        return
    assert attnswap.describe(model).patched_layers == [0, 1]


@pytest.mark.parametrize("name", ["info", "forward", "double", "my.swap", "my swap"])
def test_a_swap_whose_name_is_taken_is_refused_before_anything_changes(name: str, monkeypatch):
    """Such as a user's own, in the module that would hold its parameters."""
    monkeypatch.setattr(attnswap.Softpick, "name", name)
    model = tiny()
    with pytest.raises(ConfigError, match="cannot name a slot"):
        attnswap.patch(model, attnswap.Softpick())
    assert attnswap.describe(model).patched_layers == []


@pytest.mark.parametrize("edit", ["units 10^18", "heads twice", "layer beyond", "head beyond", "empty"])
@pytest.mark.parametrize("loader", ["PeftModel", pytest.param("load_adapter", marks=pytest.mark.slow)])
def test_a_damaged_adapter_is_refused(tmp_path: Path, edit: str, loader: str):
    """Its base is then as it was."""
    from peft import PeftModel, get_peft_model

    config = attnswap.AttnSwapConfig(swap={"name": "sigmoid", "bias": "predicted", "units": 4})
    get_peft_model(tiny(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text())
    as_entry = {"attnswap": values["spec"]}
    EDITS[edit](as_entry)
    file.write_text(json.dumps({**values, "spec": as_entry["attnswap"]}))
    base, ids = tiny(), torch.arange(3, 20)[None]
    with torch.no_grad():
        before = base(ids).logits
        with pytest.raises(CheckpointError):
            PeftModel.from_pretrained(base, tmp_path) if loader == "PeftModel" else base.load_adapter(str(tmp_path))
        assert torch.equal(base(ids).logits, before)


@pytest.mark.parametrize(("saved", "ours", "way"), [(3, 2, "upgrade attnswap"), (1, 2, "train it again")])
def test_swaps_of_another_version_of_their_maths_are_refused(monkeypatch, saved: int, ours: int, way: str):
    """Versions are written from the second on; a file without one is of the first."""
    both = attnswap.swaps.resolve("softpick+output-gate")
    assert "versions" not in spec_with(both)["swaps"][0]
    monkeypatch.setattr(attnswap.OutputGate, "version", saved)
    entry = spec_with(both)
    assert entry["swaps"][0].get("versions", {}) == ({"output-gate": saved} if saved > 1 else {})
    assert read_entry(json.loads(json.dumps(entry)))[0].layers[0]["slot"].swap == both
    monkeypatch.setattr(attnswap.OutputGate, "version", ours)
    with pytest.raises(CheckpointError, match=rf'version {saved} of "output-gate"; this attnswap has {ours}: .*{way}'):
        read_entry(entry)


def spec_with(swap):
    return PatchSpec("sdpa", {0: {"slot": Slot(swap)}}).to_dict()
