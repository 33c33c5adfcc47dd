"""``attnswap inspect``: its figures are those of measure_structure, in the terminal, in files and in a picture."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from transformers import AutoModelForCausalLM, MambaConfig

import attnswap
from attnswap.errors import ConfigError
from attnswap.evaluation.figure import short_names
from attnswap.evaluation.structure import Structure, measure_structure
from attnswap.evaluation.structure_figure import plot_structure
from tests.helpers.training import byte_tokenizer, tiny_gpt2, tiny_llama, write_model

TEXT = "The cat sat on the mat, and the dog did not. " * 8
SMALL = ("--window", "100", "--windows", "2", "--device", "cpu")
FIGURES = ["first", "row_sum", "entropy", "zeros", "dead", "largest", "ratio", "kurtosis"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the same model plain and patched, and a text."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "plain")
    attnswap.patch(model := tiny_llama(), "softpick")
    write_model(root / "picked", model)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


@pytest.fixture
def run(run):
    """Runs ``attnswap inspect`` in this process and returns (exit code, stdout, stderr)."""
    return partial(run, "inspect")


def expected(swap=None) -> Structure:
    model = tiny_llama()
    if swap:
        attnswap.patch(model, swap)
    return measure_structure(model, byte_tokenizer(), text=TEXT, window=100, windows=2)


def assert_same(report, structure: Structure) -> None:
    for name in FIGURES:
        np.testing.assert_allclose(report[name], getattr(structure, name), rtol=1e-5, atol=1e-7, err_msg=name)
    assert report["summary"] == pytest.approx(structure.summary(), rel=1e-5, abs=1e-7)
    assert (report["layers"], report["tokens"]) == (structure.layers, 200)


def assert_drawn(path, height=0):
    pixels = imread(path)
    assert pixels.shape[0] > max(400, height) and pixels.shape[1] > 1000
    assert len(np.unique(pixels[::3, ::3].sum(-1))) > 100, "many colours"
    return pixels.shape[0]


@pytest.mark.parametrize(("name", "swap"), [("plain", None), ("picked", "softpick")])
def test_json_is_what_measure_structure_finds(run, models, name, swap):
    code, out, err = run(models / name, "--text", models / "text.txt", *SMALL, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)  # nothing but JSON
    assert_same(report, expected(swap))
    assert report["schema"] == "attnswap.structure/1"
    assert (report["model"], report["text"], report["window"]) == (str(models / name), "text.txt", 100)


def test_two_models_stand_side_by_side(run, models, tmp_path):
    both = (models / "picked", "--against", models / "plain", "--text", models / "text.txt", *SMALL)
    code, out, _ = run(*both, "--out", tmp_path / "new" / "out")
    folder = tmp_path / "new" / "out"
    assert code == 0
    assert sorted(p.name for p in folder.iterdir()) == [
        "against.json",
        "structure.json",
        "structure.md",
        "structure.png",
    ]
    reports = [json.loads((folder / f"{stem}.json").read_text()) for stem in ("structure", "against")]
    assert_same(reports[0], expected("softpick"))
    assert_same(reports[1], expected())
    shown = {line.rsplit(None, 2)[0]: line.split()[-2:] for line in out.splitlines()[2:]}
    written = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (folder / "structure.md").open()]
    assert written[0] == ["attention", "picked", "plain"]
    for key in reports[0]["summary"]:
        numbers = [f"{report['summary'][key]:.4g}" for report in reports]
        assert shown[key.replace("_", " ")] == numbers
        assert [key.replace("_", " "), *numbers] in written
    assert "![" in (folder / "structure.md").read_text()
    two = assert_drawn(folder / "structure.png")
    code, out, _ = run(*both, "--json")
    assert json.loads(out) == {**reports[0], "against": reports[1]}
    (tmp_path / "one").mkdir()
    for stem in ("structure", "against"):
        (tmp_path / "one" / f"{stem}.json").write_text("of an earlier comparison")
    assert run(models / "plain", "--text", models / "text.txt", *SMALL, "--out", tmp_path / "one")[0] == 0
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["structure.json", "structure.md", "structure.png"]
    assert assert_drawn(tmp_path / "one" / "structure.png") < two, "a row of maps less"


def test_the_built_in_text_is_read_without_one(run, models):
    code, out, _ = run(models / "plain", "--window", "70", "--windows", "1", "--device", "cpu", "--json")
    assert code == 0
    assert (json.loads(out)["text"], json.loads(out)["tokens"]) == (None, 70)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["./nowhere"], 2, "no model at"),
        (["MODEL", "--against", "./nowhere"], 2, "no model at"),
        (["MODEL", "--text", "none.txt"], 2, "cannot read the text file"),
        (["MODEL", "--text", "short.txt"], 2, "too few for a window"),
        (["MODEL", "--window", "9z"], 2, "not a number of tokens"),
        (["MODEL", "--window", "64"], 2, "more than 64"),
        (["MODEL", "--windows", "0"], 2, "windows"),
        (["MODEL", "--dtype", "bf61"], 2, 'Did you mean "bf16"'),
        (["MODEL", "--device", "gpuu"], 2, 'unknown device "gpuu"'),
        (["GPT2", "--window", "200", "--device", "cpu"], 2, "cannot read windows of 200 tokens"),
        (["MAMBA"], 3, "no attention module"),
        (["NAN", *SMALL], 4, "is not finite"),
        ([], 2, "MODEL"),
    ],
)
def test_bad_input_is_one_line_with_its_code(run, models, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    made = {"MODEL": lambda folder: write_model(folder), "GPT2": lambda folder: write_model(folder, tiny_gpt2())}
    made |= {"NAN": broken, "MAMBA": mamba}
    for name in set(made) & set(arguments):
        made[name](tmp_path / name)
    given = [str(tmp_path / a) if a in made else a for a in arguments]
    found, out, err = run(*given, "--out", tmp_path / "out")
    assert (found, out, err.count("\n")) == (code, "", 1), err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    if arguments:
        assert run(*given, "--out", tmp_path / "short.txt")[0] == 2, "a file is no folder"


def broken(folder):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0] = float("nan")
    return write_model(folder, model)


def mamba(folder):
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    return write_model(folder, AutoModelForCausalLM.from_config(config))


def test_names_are_short_where_that_tells_them_apart():
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["a/model", "b/model"]) == ["a/model", "b/model"]
    assert short_names(["embedded"]) == ["embedded"]


def structure(layers, heads, seed=0):
    draw = np.random.default_rng(seed).random
    maps = {name: draw((len(layers), heads)) for name in FIGURES[:5]}
    return Structure(layers=layers, **maps, **{name: 1 + 9 * draw(len(layers)) for name in FIGURES[5:]}, tokens=100)


def test_any_shapes_and_names_are_drawn(tmp_path):
    shapes = [structure(list(range(80)), 64), structure([3, 7, 11], 2), structure([0], 1), structure([1, 2], 5)]
    names = ["$x^{", "a$b$c\\frac", "[bold]" * 20, "_hidden"]
    assert_drawn(plot_structure(shapes, tmp_path / "all.png", labels=names), height=2000)
    negative = structure([0, 1], 4)
    negative.first[:] = -0.5
    negative.zeros[:] = 0.0
    assert_drawn(plot_structure([negative], tmp_path / "negative.png", labels=["a"]))
    for given in ([], shapes):
        with pytest.raises(ConfigError, match="as many labels as structures"):
            plot_structure(given, tmp_path / "none.png", labels=names[: len(given) - 1])
    assert not (tmp_path / "none.png").exists()


def test_a_name_is_no_markup(run, models, tmp_path):
    for name in ("[red]m|n", "$1$"):
        (tmp_path / name).symlink_to(models / "plain")
    both = (tmp_path / "[red]m|n", "--against", tmp_path / "$1$", "--text", models / "text.txt")
    code, out, _ = run(*both, *SMALL, "--out", tmp_path / "out")
    assert code == 0
    assert "[red]m|n" in out
    assert "| [red]m\\|n | $1$ |" in (tmp_path / "out" / "structure.md").read_text()
