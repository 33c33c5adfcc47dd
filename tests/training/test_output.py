"""What a run may write to and take the place of: a result of ours, and nothing else, whatever the recipe says."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import attnswap
from attnswap.cli import app
from attnswap.errors import CheckpointError, ConfigError
from attnswap.healing import Experiment, heal
from attnswap.training.config import TrainConfig, parse_config
from attnswap.training.durable import check_complete, latest_checkpoint, mark_complete
from attnswap.training.output import Output
from attnswap.training.ramp import SPEC, load_ramps
from tests.helpers.tiny_models import tiny


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """A home with a thesis in it, and a working directory two levels down."""
    folder = tmp_path / "home"
    (folder / "work" / "now").mkdir(parents=True)
    (folder / "thesis.tex").write_text("years of work")
    (folder / "work" / "now" / "notes.txt").write_text("a day's")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder / "work" / "now")
    return folder


def config_of(path: str) -> TrainConfig:
    return parse_config({"output_dir": path, "overwrite": True, "swap": "ssmax"})


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def complete(path: str) -> Output:
    """What a run does with its folder from beginning to end."""
    config = config_of(path)
    output = Output(Path(path), overwrite=True)
    output.check(None)
    output.prepare(config, None)
    (output.partial / "model.safetensors").write_text("weights")
    (output.partial / "checkpoint-1").mkdir()
    output.publish(config, [], {}, {"steps": 1})
    return output


PROTECTED = [
    "~",
    "~/",
    "~/.",
    "~/work/..",
    ".",
    "",
    "..",
    "../..",
    "../../..",
    "/",
    "/.",
    "link",
    "/proc/x",
    "/dev/shm",
]


@pytest.mark.parametrize("result", [False, True], ids=["without a result", "holding a result"])
@pytest.mark.parametrize("path", PROTECTED)
def test_no_result_takes_the_place_of_what_is_protected(home: Path, path: str, result: bool):
    """Even where somebody has put the files of a result."""
    (home / "work/now/link").symlink_to(home)
    if result:
        for folder in (home, home / "work", home / "work/now"):
            for name in ("recipe.yaml", "summary.json"):
                (folder / name).write_text("{}")
    if path == "/dev/shm" and not os.path.ismount(path):
        pytest.skip("no mount point to try")
    before = everything(home)
    with pytest.raises(ConfigError, match="output_dir"):
        Output(Path(path), overwrite=True).check(None)
    assert everything(home) == before


CONTENTS: dict[str, list[str]] = {
    "a thesis": ["thesis.tex"],
    "a recipe alone": ["recipe.yaml"],
    "a summary alone": ["summary.json"],
    "a folder": ["deep/er/thesis.tex"],
    "a hidden file": [".git/config"],
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", ["", ".partial"])
@pytest.mark.parametrize("through", ["itself", "a link"])
@pytest.mark.parametrize("content", CONTENTS)
def test_only_what_is_ours_is_removed(home: Path, content: str, through: str, suffix: str, overwrite: bool):
    folder = home / f"out{suffix}"
    for name in CONTENTS[content]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("work")
    path = home / "out"
    if through == "a link":
        (path := home / "elsewhere").symlink_to(home / "out")
    before = everything(home)
    output = Output(path, overwrite=overwrite)
    if suffix and content == "a recipe alone":
        output.check(None)  # as a run leaves that was killed before its first checkpoint
    else:
        with pytest.raises(ConfigError, match="of attnswap"):
            output.check(None)
    assert everything(home) == before


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere", "a link to a folder"])
def test_what_is_no_folder_is_refused(home: Path, kind: str):
    for name in ("taken", "out.partial"):
        if kind == "a file":
            (home / name).write_text("work")
        else:
            (home / name).symlink_to(home / ("work" if "folder" in kind else "nowhere"))
    with pytest.raises(ConfigError, match="output_dir"):
        Output(home / "out", overwrite=True).check(None)
    if kind == "a file":
        with pytest.raises(ConfigError, match="is a file"):
            Output(home / "taken", overwrite=True).check(None)
    assert (home / "work/now/notes.txt").exists()


@pytest.mark.parametrize("path", ["out", "~/out", "../out", "link", "new/er/out"])
def test_a_result_is_replaced_by_the_next(home: Path, path: str):
    """Through a link as well: what it points to is replaced, and the link stays."""
    (home / "real").mkdir()
    (home / "work/now/link").symlink_to(home / "real")
    first = complete(path)
    (first.final / "old").write_text("of the first")
    second = complete(path)
    assert sorted(p.name for p in second.final.iterdir()) == [
        *("model.safetensors", "movement.json", "recipe.yaml", "summary.json", "training_log.json"),
    ]
    place = Path(path).expanduser()
    assert json.loads((place / "summary.json").read_text()) == {"steps": 1}
    assert place.is_symlink() == (path == "link")
    assert [p.name for p in second.final.parent.iterdir() if p.name.startswith(second.final.name)] == [
        second.final.name
    ]
    assert (home / "thesis.tex").exists()


def test_a_folder_called_replaced_is_the_users(home: Path):
    complete("out")
    (home / "work/now/out.replaced").mkdir()
    (home / "work/now/out.replaced/thesis.tex").write_text("work")
    complete("out")
    assert (home / "work/now/out.replaced/thesis.tex").exists()


@pytest.mark.parametrize("name", ["healed", "control", "result", "healed.partial"])
def test_healing_refuses_before_it_trains(home: Path, name: str, monkeypatch):
    monkeypatch.setattr("attnswap.healing.run.load_tokenizer", lambda reference: pytest.fail("work was begun"))
    (home / "out").mkdir()
    if name == "result":
        (home / "out" / name).write_text("work")
    else:
        (home / "out" / name).mkdir()
        (home / "out" / name / "thesis.tex").write_text("work")
    before = everything(home)
    with pytest.raises(ConfigError, match="output_dir"):
        heal(Experiment(config=config_of("~/out"), out=home / "out"))
    assert everything(home) == before


@pytest.mark.parametrize("command", ["eval", "inspect", "bench", "coverage", "patch"])
@pytest.mark.parametrize("place", ["a file", "in a file", "/proc", "a link to nowhere"])
def test_commands_refuse_before_they_work(home: Path, command: str, place: str, monkeypatch):
    monkeypatch.setattr("attnswap.loading.AutoModelForCausalLM", None)
    (home / "file").write_text("work")
    (home / "link").symlink_to(home / "nowhere")
    out = {"a file": home / "file", "in a file": home / "file/out", "/proc": Path("/proc/out")}.get(
        place, home / "link"
    )
    words = {
        "patch": ["patch", "embedded", str(out), "--swap", "softpick"],
        "bench": ["bench", "--out", str(out)],
        "coverage": ["coverage", "--types", "llama", "--out", str(out)],
    }.get(command, [command, "embedded", "--out", str(out)])
    found = CliRunner().invoke(app, words)
    assert isinstance(found.exception, ConfigError), found.exception
    assert any(word in str(found.exception) for word in ("a file", "is not writable", "exists already"))
    assert (home / "file").read_text() == "work"


def test_inspect_removes_no_comparison_but_its_own(tmp_path: Path, monkeypatch):
    from attnswap.cli import inspect

    monkeypatch.setattr(inspect, "markdown", lambda *args: "")
    monkeypatch.setattr("attnswap.evaluation.structure_figure.plot_structure", lambda *args, **more: b"")
    (tmp_path / "against.json").write_text("the user's own")
    inspect.write([{}], [], tmp_path, ["model"])
    assert (tmp_path / "against.json").read_text() == "the user's own"
    inspect.write([{}], [], tmp_path, ["model"])  # now beside a comparison's other half
    assert not (tmp_path / "against.json").exists()


DAMAGED = {
    **{text: text.encode() for text in ("", "{", "[]", "{}", "1", "null", '"files"', '{"files": 1}', '{"files": [1]}')},
    **{"of bytes": b"\xff\xfe", "deep": b"[" * 100000, "zeros": b"\0" * 100},
    **{"no names": b'{"files": {"\\u0000": 1}}', "no sizes": b'{"files": {"model.safetensors": "large"}}'},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_checkpoint_with_a_damaged_marker_is_not_whole(tmp_path: Path, damage: str):
    """The one before it is gone on from, and to load it is refused."""
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_text("weights")
        mark_complete(tmp_path / f"checkpoint-{step}")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    (tmp_path / "checkpoint-2" / "complete.json").write_bytes(DAMAGED[damage])
    with pytest.raises(CheckpointError, match="incomplete"):
        check_complete(tmp_path / "checkpoint-2")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("name", [SPEC, "config.json", "adapter_config.json"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_checkpoint_with_a_damaged_spec_is_refused(tmp_path: Path, damage: str, name: str):
    model = tiny()
    attnswap.patch(model, "softpick")
    (tmp_path / name).write_bytes(DAMAGED[damage])
    no_json = damage in ("", "{", "[]", "1", "null", '"files"', "of bytes", "deep", "zeros")
    if name == SPEC or no_json:
        with pytest.raises(CheckpointError):
            load_ramps(model, tmp_path)
    else:
        load_ramps(model, tmp_path)  # it says nothing of swaps
    assert attnswap.describe(model).patched_layers == [0, 1]
