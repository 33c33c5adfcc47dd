"""What the README shows is what the code and the committed results say."""

import json
import re

import pytest

from attnswap.cli.show import table_of_swaps
from attnswap.healing.leaderboard import read_results, table
from tests.helpers.paths import ROOT

PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]


def block(name: str, page: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGES[page], re.DOTALL)
    assert found, f"{page} has lost its {name} block"
    return found.group(1).strip()


def test_table_of_swaps():
    assert block("swaps", "README.md") == table_of_swaps()


def test_demo_table_is_the_committed_result():
    results = ROOT / "results" / "demo"
    shown, rows = block("demo", "evaluation.md"), json.loads((results / "demo.json").read_text())["rows"]
    assert (results / "demo.md").read_text().strip() in shown
    for row in rows:
        line = next(line for line in shown.splitlines() if line.startswith(f"| {row['context']} |"))
        for name in ("original", "control", "ssmax"):
            assert f"{row[name]:.3f}" in line
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", shown):
        assert (ROOT / "docs" / picture).is_file()


def test_the_demo_lowers_held_out_loss_by_two_standard_errors():
    rows = json.loads((ROOT / "results" / "demo" / "demo.json").read_text())["rows"]
    for row in rows:
        assert -row["log_ratio_to_original"] > 2 * row["standard_error"]


def test_table_of_healed_models_is_the_committed_results():
    results = read_results(ROOT / "results")
    whole = {name: result for name, result in results.items() if name == result["swap"]["name"]}
    for name in results.keys() - {"smoke"}:  # which begins with its swap's name, or the table would lose it
        assert name.startswith(results[name]["swap"]["name"])
    assert table(whole, link="../results/", contexts=(512, 2048, 8192)) == block("healing", "healing.md")


def test_figures_of_coverage_and_speed_are_the_committed_ones():
    results, text = ROOT / "results", " ".join(" ".join(PAGES.values()).split())
    coverage = json.loads((results / "coverage" / "coverage.json").read_text())
    assert f"{coverage['passing']} of {coverage['types']} types pass" in text
    failing = {row["type"] for row in coverage["rows"] if not row["passes"]}
    alone = {row["type"] for row in coverage["rows"] if row["seam"] == "scores"} - failing
    assert len(alone) == 16 and "Sixteen of them compute attention themselves" in text

    ratios = {"forward": [], "forward+backward": []}
    entmax = {"float32": [], "bfloat16": []}
    for file in (results / "bench").glob("**/bench.json"):
        for cell in json.loads(file.read_text())["cells"]:
            if cell["kind"] == "swap" and cell["swap"]["name"] == "entmax" and cell["ratio"]:
                entmax[cell["dtype"]].append(cell["ratio"]["median"])
            native = cell["kind"] == "swap" and cell["swap"]["name"] in ("softpick", "sigmoid", "forgetting-gate")
            if native and cell["dtype"] == "bfloat16" and cell["ratio"] and "=-0.7" not in cell["label"]:
                ratios[cell["mode"]].append(cell["ratio"]["median"])
    assert f"takes up to {max(ratios['forward']):.1f} times the time of" in text
    assert f"entmax up to {max(entmax['float32']):.1f} times that" in text
    assert f"Entmax computes in fp32 and takes up to {max(entmax['bfloat16']):.1f} times as long" in text
    least, most = min(ratios["forward+backward"]), max(ratios["forward+backward"])
    assert f"a training pass {least:.1f} to {most:.1f} times" in text


def test_figures_of_the_first_screen_are_the_committed_ones():
    contexts = json.loads((ROOT / "results" / "softpick" / "result.json").read_text())["contexts"]
    ratios = {row["context"]: f"{row['ratio_to_control']['ratio']:.4f}" for row in contexts}
    assert re.search(rf"{ratios[512]} times .* at 512 tokens and {ratios[8192]} times at 8192", README)
    coverage = json.loads((ROOT / "results" / "coverage" / "coverage.json").read_text())
    assert f"all {coverage['types']} causal language model types" in README
    assert f"{coverage['passing']} pass every check" in README
    assert "entmax up to 1.7 times that" in README and "entmax up to 1.7 times that" in PAGES["speed.md"]


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for path in re.findall(r"`((?:recipes|results|docs|notebooks|tests)/[\w./-]+)`", PAGES[page]):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", PAGES[page]):
        assert link.startswith("https://") or (folder / link).exists(), link


def test_shell_commands_name_real_files_and_options():
    for command in re.findall(r"^ *(?:accelerate|attnswap) .*$", "\n".join(PAGES.values()), re.MULTILINE):
        for path in re.findall(r"recipes/[\w./-]+", command):
            assert (ROOT / path).exists()
