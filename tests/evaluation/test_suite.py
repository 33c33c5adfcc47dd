"""The long suite measures what its parts measure, and its report says so in JSON, Markdown and HTML."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import attnswap
from attnswap.cli import main
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.evaluation import evaluate_perplexity
from attnswap.evaluation.bootstrap import standard_error
from attnswap.evaluation.quantize import rounded
from attnswap.evaluation.retrieval import measure_retrieval
from attnswap.evaluation.sections import suite_report
from attnswap.evaluation.suite import Profile, SuiteOptions, gain_from_context, profile
from tests.helpers.browser import looked_at
from tests.helpers.training import byte_tokenizer, tiny_llama, write_model

TEXT = "The cat sat on the mat, and the dog did not. " * 40
OPTIONS = SuiteOptions(
    contexts=(64, 256), max_tokens=600, tasks=("passkey",), depths=(0.0, 1.0), prompts=1, quantized_context=64
)


@pytest.fixture(scope="module")
def pair() -> tuple[Profile, Profile]:
    tokenizer, original, model = byte_tokenizer(), tiny_llama(), tiny_llama()
    attnswap.patch(model, "softpick")
    before = profile(original, tokenizer, options=OPTIONS, text=TEXT, quiet=True, model_id="original")
    found = profile(
        model, tokenizer, reference=original, baseline=before.evaluation, options=OPTIONS, text=TEXT, quiet=True
    )
    return found, before


def test_every_part_is_measured_as_it_is_alone(pair: tuple[Profile, Profile]) -> None:
    found, before = pair
    tokenizer, model = byte_tokenizer(), tiny_llama()
    attnswap.patch(model, "softpick")
    alone = evaluate_perplexity(model, tokenizer, text=TEXT, contexts=(64, 256), max_tokens=600, quiet=True)
    assert found.evaluation.at(256).nll == alone.at(256).nll
    assert found.retrieval == measure_retrieval(
        model, tokenizer, tasks=["passkey"], lengths=[256], depths=[0.0, 1.0], n=1
    )
    with rounded(model, 4):
        coarse = evaluate_perplexity(model, tokenizer, text=TEXT, contexts=(64,), max_tokens=600, quiet=True)
    np.testing.assert_array_equal(found.quantized["int4"], coarse.nll[64])
    assert set(found.quantized) == {"full", "int8", "int4"}
    assert found.fidelity is not None
    assert found.fidelity.kl > 0
    assert before.fidelity is None


def test_gain_is_the_difference_of_paired_losses(pair: tuple[Profile, Profile]) -> None:
    evaluation = pair[0].evaluation
    (gain,) = gain_from_context(evaluation)
    assert gain.context == 256
    assert gain.gain == pytest.approx(evaluation.at(64).nll - evaluation.at(256).nll, abs=1e-6)
    assert gain.lo <= gain.gain <= gain.hi


def test_the_report_compares_with_the_original(pair: tuple[Profile, Profile]) -> None:
    found, before = pair
    report = json.loads(json.dumps(suite_report(found, before), allow_nan=False))
    assert report["schema"] == "attnswap.suite/1"
    sections = {section["name"]: section for section in report["sections"]}
    assert list(sections) == [
        "perplexity", "gain", "position", "retrieval", "structure", "quantization", "fidelity",
    ]  # fmt: skip
    assert [row[2] for row in sections["position"]["table"]["rows"]] == [e.nll for e in found.evaluation.position_nll]
    assert report["original"]["id"] == report["model"]["compared with"] == "original"
    assert report["swap"] == found.evaluation.swap
    assert report["options"]["tasks"] == ["passkey"]
    assert report["protocol"]["contexts"] == [64, 256]
    for section in sections.values():
        assert all(len(row) == len(section["table"]["columns"]) for row in section["table"]["rows"])
    row = sections["perplexity"]["table"]["rows"][1]
    assert row[:2] == [256, found.evaluation.at(256).ppl]
    assert row[5] == pytest.approx(found.evaluation.at(256).ppl / before.evaluation.at(256).ppl)
    losses = {row[0]: row for row in sections["quantization"]["table"]["rows"]}
    assert losses["full"][2:] == [0.0, 0.0, None, None]
    assert losses["int4"][2] == pytest.approx(
        float((found.quantized["int4"].astype("f8") - found.quantized["full"]).mean())
    )
    more, less = (p.quantized["int4"].astype("f8") - p.quantized["full"] for p in (found, before))
    assert losses["int4"][4:] == [pytest.approx(float((more - less).mean())), standard_error(more - less)]
    broken = replace(before, quantized={name: nll for name, nll in before.quantized.items() if name != "int4"})
    assert suite_report(found, broken)["sections"][5]["table"]["rows"][-1][3:] == [None, None, None]
    lone = suite_report(before)
    assert [section["name"] for section in lone["sections"]][-1] == "quantization"
    assert lone["sections"][0]["table"]["columns"] == [
        "context",
        "perplexity",
        "bits per byte",
        "standard error (nats)",
    ]


def test_models_that_were_asked_different_questions_are_not_compared(pair: tuple[Profile, Profile]) -> None:
    other = replace(pair[1], retrieval=pair[1].retrieval[:1])
    with pytest.raises(ConfigError, match="different prompts"):
        suite_report(pair[0], other)


def test_what_rounding_breaks_has_no_number(pair: tuple[Profile, Profile], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: torch.Tensor, bits: int, group: int = 64) -> torch.Tensor:
        return weight if bits == 8 else torch.full_like(weight, torch.nan)

    monkeypatch.setattr("attnswap.evaluation.quantize.round_to_nearest", broken)
    model = tiny_llama()
    found = profile(model, byte_tokenizer(), options=OPTIONS, text=TEXT, quiet=True)
    assert set(found.quantized) == {"full", "int8"}
    assert not any(p.isnan().any() for p in model.parameters())
    section = next(s for s in suite_report(found, pair[1])["sections"] if s["name"] == "quantization")
    assert [row[1] is None for row in section["table"]["rows"]] == [False, False, True]
    assert section["table"]["rows"][2][3] is not None, "the original's is there"
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    assert found.rounded_share == linear / sum(p.numel() for p in model.parameters())


def test_what_cannot_be_measured_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("attnswap.evaluation.suite.evaluate_perplexity", refuse)
    for changes, words in (
        ({"prompts": 0}, "at least 1 prompt"),
        ({"tasks": ()}, "retrieval needs tasks"),
        ({"tasks": ("multikey",), "contexts": (32, 80)}, "too few for the task"),
        ({"contexts": (64,)}, "more than 64"),
    ):
        with pytest.raises(ConfigError, match=words):
            profile(tiny_llama(), byte_tokenizer(), options=replace(OPTIONS, **changes), text=TEXT, quiet=True)
    other = tiny_llama(vocab_size=300)
    with pytest.raises(ConfigError, match="vocabularies"):
        profile(tiny_llama(), byte_tokenizer(), reference=other, options=OPTIONS, text=TEXT, quiet=True)
    coarse = tiny_llama()
    coarse.model.layers[0].mlp.up_proj.weight.data = torch.zeros(1, dtype=torch.float8_e4m3fn)
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        profile(coarse, byte_tokenizer(), options=OPTIONS, text=TEXT, quiet=True)


def run(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["attnswap", "eval", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def reported(tmp_path: Path) -> tuple[list[str], Path]:
    """Runs the suite on a tiny healed model; returns the command but for baseline and out, and the folder."""
    torch.manual_seed(0)
    healed = tiny_llama(max_position_embeddings=512)
    attnswap.patch(healed, "softpick")
    write_model(tmp_path / "healed", healed)
    write_model(tmp_path / "original", tiny_llama(max_position_embeddings=512).bfloat16())
    (tmp_path / "text.txt").write_text(TEXT * 2)
    out = tmp_path / "out"
    words = [str(tmp_path / "healed"), "--suite", "long", "--text", str(tmp_path / "text.txt"), "--prompts", "1"]
    words += ["--contexts", "64,512", "--max-tokens", "600", "--seed", "3"]
    assert run(*words, "--baseline", str(tmp_path / "original"), "--out", str(out)) == 0
    return words, out


def test_the_command_writes_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, out = reported(tmp_path)
    assert {path.name for path in out.iterdir()} == {
        "report.html", "suite.json", "suite.md", "evaluation.json", "evaluation.npz", "perplexity.png",
        "retrieval.png", "structure.png",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "Perplexity by context" in printed
    assert "Divergence from the original" in printed
    report = json.loads((out / "suite.json").read_text())
    page, table = (out / "report.html").read_text(), (out / "suite.md").read_text()
    for section in report["sections"]:
        assert section["title"] in page
        assert section["title"] in table
    assert page.count("data:image/png;base64,") == 3
    assert not any("rounding" in note for note in report["notes"]), "both in the dtype of the model in question"
    assert json.loads((out / "evaluation.json").read_text())["env"]["seed"] == 3
    assert json.loads((out / "suite.json").read_text())["options"]["seed"] == 3

    capsys.readouterr()
    assert run(*words, "--suite", "short") == 2
    assert "--suite takes" in capsys.readouterr().err
    assert run(*words, "--baseline", str(out / "evaluation.json")) == 2
    assert "--baseline takes a model" in capsys.readouterr().err
    assert run(*words, "--batch-size", "2") == 2
    assert run(*words, "--stride", "64") == 2


@pytest.mark.slow
def test_a_browser_shows_the_report(tmp_path: Path) -> None:
    _, out = reported(tmp_path)
    found = looked_at(out / "report.html", tmp_path, 1000)
    sections = json.loads((out / "suite.json").read_text())["sections"]
    assert found["headings"] == [section["title"] for section in sections]
    assert len(found["pictures"]) == 3
    assert all(width > 300 for width in found["pictures"]), "loaded, and allowed by the page's policy"
    assert found["page"][0] <= found["page"][1]
    for section in sections:
        for row in section["table"]["rows"]:
            assert str(row[0]) in found["text"]
