"""What can be refused without a model is refused before one is loaded, which is slow."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnswap.cli import main
from tests.helpers.training import recipe, tiny_llama

TOO_LONG = {"data": {"sequence_length": 256}}
RECIPES: dict[str, tuple[dict[str, Any], str]] = {
    "data": ({"data": {"files": ["nowhere/*.txt"]}}, "no file matches"),
    "no text": ({"data": {"files": ["EMPTY"]}}, "but needs two"),
    "JSON lines": ({"data": {"files": ["BROKEN"]}}, "not valid JSON"),
    "long documents": (
        {"stages": [{"name": "long", "share": 1.0, "sequence_length": 128}], "data": {"max_documents": 2}},
        "no training document fills",
    ),
    "window": (TOO_LONG, "must be at most 128, the number of positions"),
    "tokenizer": ({"model": {"reference": "MODEL", "tokenizer": "BARE"}}, "no tokenizer"),
    "model": ({"model": {"reference": "./nowhere"}}, "no model at"),
    "foreign model": ({"model": {"reference": "EMPTY FOLDER"}}, "no model config"),
    "teacher": (
        {"teacher": "./nowhere", "stages": [{"name": "all", "share": 1.0, "loss": {"kl": 1.0}}]},
        "no model at",
    ),
    "arguments": ({"training": {"bf16": True, "fp16": True}}, "At most one of fp16 and bf16"),
    "optimizer": ({"swap": "softpick", "optimizer": {"freeze": "all_but_swap"}}, "no parameters of its own"),
    "output": ({"output_dir": "TAKEN/out"}, "is a file"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, in which no model can be loaded."""

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a model was loaded first")

    monkeypatch.chdir(tmp_path)
    recipe(tmp_path)  # writes the model and a text
    tiny_llama().save_pretrained(tmp_path / "bare")
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "taken").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "short.txt").write_text("short " * 9)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", forbidden)
    return tmp_path


NAMES = {
    "MODEL": "./model", "BARE": "./bare", "EMPTY FOLDER": "./empty folder", "EMPTY": "empty.txt", "TAKEN": "taken",
    "BROKEN": "broken.jsonl", "SHORT": "short.txt",
}  # fmt: skip


def at(text: str) -> str:
    for name, real in NAMES.items():
        text = text.replace(name, real)
    return text


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr("sys.argv", ["attnswap", *words])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert said.strip().splitlines()[-1].startswith("error: ")
    left = {path for path in Path().rglob("*") if "cache" not in path.parts}
    assert left == {path for path in before if "cache" not in path.parts}, "nothing is left behind"
    return said


@pytest.mark.parametrize("command", ["train", "heal"])
@pytest.mark.parametrize("fault", RECIPES)
def test_recipes(
    fault: str, command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = RECIPES[fault]
    values = recipe(place, **json.loads(at(json.dumps({"swap": "ssmax"} | changes))))
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert message in refused(monkeypatch, capsys, command, "recipe.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval MODEL --text nowhere.txt", "cannot read the text file"),
        ("eval MODEL --text BROKEN", "not valid JSON"),
        ("eval MODEL --text EMPTY --contexts 32", "empty"),
        ("eval MODEL --text SHORT --contexts 64", "at least 64"),
        ("eval MODEL --suite long --text SHORT --contexts 64", "at least 64"),
        ("eval MODEL --baseline ./nowhere --text text.txt --contexts 32", "no model at"),
        ("eval ./nowhere --baseline MODEL --text text.txt --contexts 32", "no model at"),
        ("eval MODEL --suite long --baseline ./nowhere --text text.txt --contexts 32", "no model at"),
        ("eval MODEL --baseline BARE --text text.txt --contexts 32", "no tokenizer"),
        ("eval BARE --baseline MODEL --text text.txt --contexts 32", "no tokenizer"),
        ("eval MODEL --baseline nowhere.json", "cannot read the evaluation"),
        ("eval MODEL --out TAKEN", "is a file"),
        ("eval MODEL --out TAKEN/deeper/still", "is a file"),
        ("inspect MODEL --text nowhere.txt", "cannot read the text file"),
        ("inspect MODEL --text SHORT --window 80", "too few for a window of 80"),
        ("inspect MODEL --against BARE --text text.txt --window 80", "no tokenizer"),
        ("inspect MODEL --against ./nowhere --text text.txt --window 80", "no model at"),
        ("inspect MODEL --out TAKEN/deeper", "is a file"),
        ("patch BARE out --swap ssmax", "no tokenizer"),
        ("patch MODEL TAKEN/deeper/out --swap ssmax", "is a file"),
    ],
)
def test_commands(
    words: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(monkeypatch, capsys, *(at(word) for word in words.split()))


def test_the_folder_of_a_finished_control(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    control = place / "control"
    control.mkdir()
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe(place, swap="ssmax")))
    (control / "recipe.yaml").write_text(yaml.safe_dump(recipe(place, swap="none")))
    words = ["heal", "recipe.yaml", "--control", str(control)]
    assert "cannot read" in refused(monkeypatch, capsys, *words)
    (control / "summary.json").write_text("{}")
    assert "no model config" in refused(monkeypatch, capsys, *words)
