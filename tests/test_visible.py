"""Text from files is shown as text: no markup, no orders to the terminal, no script, no formula."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import attnswap
from attnswap.cli import app, inspect, main, suite
from attnswap.cli.terminal import Terminal
from attnswap.evaluation.figure import plain
from attnswap.evaluation.html import write_html
from attnswap.evaluation.report import table as evaluation_table
from attnswap.healing.report import table as healing_table
from attnswap.markdown import markdown_table
from attnswap.training.summary import table as training_table
from attnswap.visible import visible
from tests.helpers.tiny_models import tiny

HOSTILE = {
    "closing tag": "[/red]",
    "link": "[link=https://example.org]name[/link]",
    "style": "[bold red]name",
    "emoji": ":warning:",
    "title": "\x1b]0;owned\x07",
    "clear": "\x1b[2J\x1b[H",
    "one byte": "\x9b2J",
    "carriage return": "honest\rforged",
    "backspace": "a\b\b\bb",
    "direction": "\u202egnp.exe",
    "invisible": "na\u200bme",
    "surrogate": "name\udc80",
    "script": "<script>alert(1)</script>",
    "markup at its end": "name\\",
}


FEW = [
    pytest.param(name, marks=() if name in ("closing tag", "link", "title", "direction") else pytest.mark.slow)
    for name in HOSTILE
]


def as_shown(name: str) -> str:
    return visible(HOSTILE[name])


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_visible_is_printable(name: str):
    shown = visible(HOSTILE[name])
    assert shown.isprintable() and visible(shown) == shown
    shown.encode("utf-8")
    assert visible("ünïcode 漢字 \n\t") == "ünïcode 漢字 \n\t"


def structure() -> Any:
    return SimpleNamespace(summary=lambda: {"sinks": 0.5})


def evaluation(name: str) -> Any:
    return SimpleNamespace(
        label=name,
        notes=[name],
        corpus={"id": name},
        protocol=SimpleNamespace(scored_tokens=3, name="half"),
        env={"dtype": "float32"},
        metrics=[],
    )


def summary(name: str) -> dict[str, Any]:
    stage = {"name": name, "steps": 1, "sequence_length": 2, "seconds_per_step": None}
    numbers = ("fit_tokens", "windows_per_step", "parameters_trained", "parameters", "train_loss", "seconds")
    none = {"held_out_loss_before": None, "held_out_loss": None, "held_out_tokens": None, "moved": {}}
    return {"swap": {"name": name}, "model": name, "stages": [stage], **dict.fromkeys(numbers, 1), **none}


def healed(name: str) -> dict[str, Any]:
    ratio = {"ratio": 1.0, "lo": 1.0, "hi": 1.0}
    entry = {
        "context": 1,
        "perplexity": {"original": 1.0},
        "ratio_to_control": ratio,
        "bypassed_to_healed": ratio,
        "recovered_fraction": None,
    }
    return {
        "swap": {"name": name, "option": name},
        "model": name,
        "layers": name,
        "heads": name,
        "tokens": 1,
        "contexts": [entry],
        "proof_of_use": {"cost_of_bypass": {"1": 0.0}, "used": None},
    }


def section(name: str) -> dict[str, Any]:
    return {"title": name, "text": name, "table": {"columns": [name], "rows": [[name]]}}


LIBRARY: dict[str, Callable[[str], Any]] = {
    "evaluation": lambda name: evaluation_table(evaluation(name)),
    "training": lambda name: training_table(summary(name)),
    "healing": lambda name: healing_table(healed(name)),
    "inspect": lambda name: inspect.table([structure()], [name]),
}
"""Tables that users print on consoles of their own, too."""
COMMANDS: dict[str, Callable[[str], Any]] = {
    **LIBRARY,
    "suite": lambda name: suite._table(section(name)),
    "a line": lambda name: f"written to {name}",
}


def printed(shown: Any, console: type[Console]) -> str:
    file = io.StringIO()
    console(file=file, width=500, color_system=None, force_terminal=True).print(shown, soft_wrap=True)
    return file.getvalue()


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    ("channel", "console"),
    [*((channel, Terminal) for channel in COMMANDS), *((channel, Console) for channel in LIBRARY)],
)
def test_tables_show_names_as_they_are(name: str, channel: str, console: type[Console]):
    found = printed(COMMANDS[channel](HOSTILE[name]), console)
    assert as_shown(name) in found
    assert HOSTILE[name].isprintable() or HOSTILE[name] not in found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = tiny()
    attnswap.patch(model, "softpick")
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("target", ["checkpoint", "recipe", "resolved recipe", "folder"])
def test_describe_shows_what_it_finds(checkpoint: Path, tmp_path: Path, name: str, target: str):
    words = ["describe"]
    if "recipe" in target:
        (tmp_path / "recipe.yaml").write_text(json.dumps({"output_dir": HOSTILE[name], "swap": "ssmax"}))
        words += [str(tmp_path / "recipe.yaml"), *(["--resolved"] if "resolved" in target else [])]
    else:
        values = json.loads((checkpoint / "config.json").read_text())
        folder = tmp_path / (HOSTILE[name].replace("/", "") if target == "folder" else "model")
        folder.mkdir()
        if target == "checkpoint":
            values["attnswap"]["before"] = HOSTILE[name]
        (folder / "config.json").write_text(json.dumps(values))
        words.append(str(folder))
    found = CliRunner().invoke(app, words, env={"COLUMNS": "500"})
    if name == "surrogate" and "recipe" in target:  # which YAML does not allow
        assert found.exit_code
        return
    assert found.exit_code == 0, found.exception
    wanted = as_shown(name).replace("/", "") if target == "folder" else as_shown(name)
    assert wanted in found.output
    assert HOSTILE[name].isprintable() or HOSTILE[name] not in found.output


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("command", ["describe", "train", "patch", "eval"])
def test_errors_show_names_as_they_are(name: str, command: str, monkeypatch, capsys):
    target = f"./no-such-{HOSTILE[name].replace('/', '')}"
    words = [command, target, *(["out", "--swap", "softpick"] if command == "patch" else [])]
    monkeypatch.setattr(sys, "argv", ["attnswap", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said[:-1].isprintable()


@pytest.mark.parametrize("name", FEW)
def test_reports_of_patches_and_pages_show_names_as_they_are(name: str, tmp_path: Path):
    model = tiny()
    report = attnswap.patch(model, "softpick")
    said = str(type(report)(HOSTILE[name], HOSTILE[name], report.layers, 0, (HOSTILE[name],)))
    assert as_shown(name) in said and said.replace("\n", "").isprintable()
    report_of = {"title": HOSTILE[name], "notes": [HOSTILE[name]], "sections": [section(HOSTILE[name])]}
    page = suite.markdown(report_of)
    assert as_shown(name) in page and page.replace("\n", "").isprintable()
    path = write_html(
        {**report_of, "model": {HOSTILE[name]: HOSTILE[name]}}, [], tmp_path / "x.html", title=HOSTILE[name]
    )
    text = path.read_text(encoding="utf-8")
    assert text.replace("\n", "").isprintable() and "<script>alert" not in text


def test_a_cell_stays_in_its_row():
    lines = markdown_table(["a", "b"], [["one\ntwo", "x | y"], ["\x1b[2J", "z"]]).splitlines()
    assert lines[2:] == ["| one two | x \\| y |", "| \\x1b[2J | z |"]


@pytest.mark.parametrize("name", [*FEW, "formula"])
def test_labels_of_pictures_are_drawn(name: str):
    """Half a formula ended in an error of matplotlib, and what begins with an underscore was left out of legends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    for label in (HOSTILE.get(name, r"a$\frac$b$"), f"_{name}"):
        figure = Figure()
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot([1], [1], label=plain(label))
        legend = axes.legend()
        figure.canvas.draw()
        assert len(legend.get_texts()) == 1
