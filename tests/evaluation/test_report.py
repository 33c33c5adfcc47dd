"""What becomes of an evaluation: intervals, files, table, plot, metric and command."""

import io
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from attnswap.cli.eval import eval_command
from attnswap.cli.options import parse_size
from attnswap.errors import ConfigError, NumericsError
from attnswap.evaluation import (
    Evaluation,
    block_bootstrap,
    compare,
    evaluate_perplexity,
    markdown,
    plot,
    table,
    write_report,
)
from attnswap.evaluation.bootstrap import standard_error
from attnswap.evaluation.corpus import read_dataset, read_text
from attnswap.evaluation.metric import AttnSwapPerplexity
from attnswap.evaluation.result import write_atomically
from attnswap.text import evaluation_text

TEXT = evaluation_text()[:1500]
OPTIONS = {"text": TEXT, "contexts": [8, 32], "max_tokens": 256, "quiet": True}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([evaluation_text()[:50_000]], vocab_size=300, special_tokens=["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained.to_str()), bos_token="<s>")


def build(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.2, **shape))


@pytest.fixture(scope="module")
def pair(tokenizer) -> tuple[Evaluation, Evaluation]:
    swapped = build(1)
    swapped.config.attnswap = {"format": 1, "name": "ssmax"}
    return (
        evaluate_perplexity(swapped, tokenizer, model_id="some/swapped", **OPTIONS),
        evaluate_perplexity(build(0), tokenizer, model_id="some/original", **OPTIONS),
    )


def with_losses(evaluation: Evaluation, losses: np.ndarray) -> Evaluation:
    protocol = replace(evaluation.protocol, contexts=(8,), scored_tokens=len(losses))
    return replace(evaluation, protocol=protocol, nll={8: losses.astype(np.float32)})


def test_interval_covers_the_truth_where_neighbours_are_correlated(pair):
    generator = np.random.default_rng(0)
    truth, tokens, runs = 0.05, 4096, 200
    hits = {128: 0, 1: 0}
    for _ in range(runs):
        common = generator.normal(3.0, 2.0, tokens)
        noise = np.convolve(generator.normal(size=tokens + 31), np.full(32, 32**-0.5), mode="valid")
        ours, baseline = (with_losses(pair[0], values) for values in (common + truth + 0.3 * noise, common))
        for block in hits:
            (found,) = compare(ours, baseline, block=block, resamples=150)
            assert found.lo <= found.log_ratio <= found.hi
            hits[block] += found.lo <= truth <= found.hi
    assert 0.87 <= hits[128] / runs <= 0.99
    assert hits[1] / runs < 0.6  # tokens drawn one by one are far too sure of themselves


def test_standard_error_of_independent_values_is_the_textbook_one():
    values = np.random.default_rng(1).normal(size=20_000)
    assert standard_error(values, block=10) == pytest.approx(values.std() / 20_000**0.5, rel=0.06)
    assert standard_error(np.ones(100)) == 0.0
    np.testing.assert_array_equal(block_bootstrap(values, seed=3), block_bootstrap(values, seed=3))
    assert (block_bootstrap(values, seed=3) != block_bootstrap(values, seed=4)).any()
    assert len(np.unique(block_bootstrap(np.arange(16.0), block=128))) > 10  # short data still have a spread
    for options in ({"block": 0}, {"resamples": 1}):
        with pytest.raises(ConfigError, match="block must be at least 1"):
            block_bootstrap(values, **options)


def test_comparison_is_paired_and_consistent_with_the_metrics(pair):
    ours, baseline = pair
    for entry in compare(ours, baseline):
        assert entry.ratio == pytest.approx(ours.at(entry.length).ppl / baseline.at(entry.length).ppl)
        assert entry.lo < entry.log_ratio < entry.hi
        assert entry.se > 0
        back = next(other for other in compare(baseline, ours) if other.length == entry.length)
        assert (back.lo, back.hi) == pytest.approx((-entry.hi, -entry.lo))
    rough = replace(ours, env={**ours.env, "block": 4, "seed": 7})
    assert compare(rough, baseline) == compare(ours, baseline, block=4, seed=7) != compare(ours, baseline)
    itself = compare(ours, ours)
    assert [(e.length, e.ratio, e.lo, e.hi, e.se) for e in itself] == [
        (8, 1.0, 0.0, 0.0, 0.0),
        (32, 1.0, 0.0, 0.0, 0.0),
    ]


def test_what_differs_is_not_compared(pair, tokenizer):
    ours, model = pair[0], build(0)
    other_text = TEXT.replace("assert", "Assert")
    differing = [
        ({"stride": 32}, "protocol"),
        ({"max_tokens": 200}, "scored tokens"),
        ({"contexts": [8, 16]}, "scored tokens"),
        ({"text": other_text}, "token ids"),
    ]
    for options, message in differing:
        other = evaluate_perplexity(model, tokenizer, **{**OPTIONS, **options})
        with pytest.raises(ConfigError, match=f"not comparable with the baseline: {message}"):
            compare(ours, other)
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ConfigError, match="token ids"):
        evaluate_perplexity(model, tokenizer, **{**OPTIONS, "text": other_text}, baseline=ours)
    assert not ran  # refused before any work
    subset = evaluate_perplexity(model, tokenizer, **{**OPTIONS, "contexts": [16, 32]}, baseline=ours)
    assert [entry.length for entry in compare(subset, ours)] == [32]
    assert not any("rounding" in note for note in subset.notes)
    rough = evaluate_perplexity(model.bfloat16(), tokenizer, **OPTIONS, baseline=ours)
    assert "measured in bfloat16, the baseline in float32" in " ".join(rough.notes)


def test_report_files(pair, tmp_path):
    ours, baseline = pair
    paths = write_report(ours, tmp_path / "new" / "dir", baseline=baseline, name="result")
    assert sorted(path.name for path in (tmp_path / "new" / "dir").iterdir()) == [
        "result.json",
        "result.md",
        "result.npz",
        "result.png",
    ]
    report = json.loads(paths["json"].read_text())
    assert report["swap"] == {"format": 1, "name": "ssmax"}
    assert report["baseline"]["swap"] is None
    assert report["model"]["id"] == "some/swapped"
    assert report["model"]["arch"] == "LlamaForCausalLM"
    assert report["model"]["params"] == sum(p.numel() for p in build(0).parameters())
    assert [entry["length"] for entry in report["metrics"]["ppl"]] == [8, 32]
    assert [entry["length"] for entry in report["baseline"]["comparison"]] == [8, 32]
    reads = {entry["context"]: entry["tokens"] for entry in report["cost"]["by_context"]}
    assert reads == {"8": 2 * 256, "32": 2 * 256, "positions": 256}
    assert report["cost"]["tokens_read"] == 1280
    text = paths["md"].read_text()
    assert f"| 8 | {ours.at(8).ppl:.4g} |" in text
    assert text == markdown(ours, baseline)
    assert paths["png"].read_bytes().startswith(b"\x89PNG")

    loaded = Evaluation.load(paths["json"])
    assert loaded.to_dict() == ours.to_dict()
    np.testing.assert_array_equal(loaded.nll[32], ours.nll[32])
    assert compare(loaded, baseline) == compare(ours, baseline)


def test_report_follows_its_schema(pair, tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(files("attnswap.evaluation").joinpath("schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for baseline in (None, pair[1]):
        report = json.loads(write_report(pair[0], tmp_path, baseline=baseline)["json"].read_text())
        jsonschema.validate(report, schema)
        for key in set(schema["required"]):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate({name: value for name, value in report.items() if name != key}, schema)


def test_files_that_do_not_belong_together_are_refused(pair, tmp_path):
    ours = write_report(pair[0], tmp_path, name="ours")
    other = write_report(pair[1], tmp_path, name="other")
    other["npz"].replace(ours["npz"])
    with pytest.raises(ConfigError, match="different runs"):
        Evaluation.load(ours["json"])
    with pytest.raises(ConfigError, match=r"other\.npz"):
        Evaluation.load(other["json"])
    (tmp_path / "wrong.json").write_text('{"schema": "attnswap.eval/2"}')
    with pytest.raises(ConfigError, match="schema is not"):
        Evaluation.load(tmp_path / "wrong.json")
    (tmp_path / "cut.json").write_text(ours["json"].read_text()[:100])
    with pytest.raises(ConfigError, match="cannot read"):
        Evaluation.load(tmp_path / "cut.json")
    losses = ours["npz"].read_bytes()
    for damaged in (b"", losses[:100]):
        ours["npz"].write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"ours\.json"):
            Evaluation.load(ours["json"])


def test_a_failed_write_leaves_files_as_they_were(pair, tmp_path, monkeypatch):
    paths = write_report(pair[0], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="not comparable"):
        write_report(pair[0], tmp_path, baseline=with_losses(pair[1], np.ones(8)))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(paths["json"], b"half")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_table_and_plot_of_several(pair, tmp_path):
    console = Console(width=80, file=io.StringIO())
    console.print(table(*pair))
    shown = console.file.getvalue()
    (first, _) = compare(*pair)
    assert f"{first.ratio:.4f} [{np.exp(first.lo):.4f}, {np.exp(first.hi):.4f}]" in shown
    path = plot([pair[0], pair[1]], tmp_path / "both.png", baseline=pair[1], labels=["result", "control"])
    assert path.stat().st_size > 10_000
    assert plot([pair[0]], tmp_path / "one.png").read_bytes() != path.read_bytes()
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot([], tmp_path / "none.png")


def test_metric_of_the_evaluate_library_loads_offline_from_its_path(pair, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = str(files("attnswap.evaluation").joinpath("metric.py"))
    swapped = {"model": build(1), "tokenizer": tokenizer, "predictions": [TEXT], "contexts": [8, 32], "max_tokens": 256}
    for metric in (evaluate.load(path, cache_dir=str(tmp_path)), AttnSwapPerplexity(cache_dir=str(tmp_path))):
        found = metric.compute(**swapped)
        assert found["contexts"] == [8, 32]
        assert found["scored_tokens"] == 256
        assert found["perplexities"] == [entry.ppl for entry in pair[0].metrics]
        assert found["bits_per_byte"] == [entry.bpb for entry in pair[0].metrics]


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for seed, name in ((0, "original"), (1, "other")):
        build(seed).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    return root


def run(*arguments: object):
    app = typer.Typer()
    app.command()(eval_command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_against_a_model_and_against_its_report(pair, checkpoints, tmp_path):
    shared = (
        "--contexts",
        "8,32",
        "--max-tokens",
        "256",
        "--text",
        checkpoints / "text.txt",
        "--device",
        "cpu",
        "--json",
    )
    ours = run(checkpoints / "other", *shared, "--baseline", checkpoints / "original", "--out", tmp_path)
    assert ours.exit_code == 0, ours.output
    report = json.loads(ours.stdout)  # nothing but JSON on stdout
    assert "estimate:" in ours.stderr
    assert report["corpus"]["id"] == "text.txt"
    assert report["env"]["dtype"] == "float32"
    assert report["metrics"]["ppl"][0]["nll"] == pytest.approx(pair[0].at(8).nll, abs=1e-6)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    again = run(checkpoints / "other", *shared, "--baseline", tmp_path / "baseline.json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["baseline"] == report["baseline"]


def test_command_prints_a_table(checkpoints):
    found = run(
        checkpoints / "original", "--contexts", "16,64", "--max-tokens", "128", "--dtype", "bf16", "--device", "cpu"
    )
    assert found.exit_code == 0, found.output
    for expected in ("pydoc-topics", "bfloat16", "ppl", "64"):
        assert expected in found.stdout
    assert "estimate:" not in found.stdout


def test_command_refuses_bad_input(checkpoints, tmp_path):
    broken = build(0)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    PreTrainedTokenizerFast.from_pretrained(checkpoints / "original").save_pretrained(tmp_path / "broken")
    text, model = checkpoints / "text.txt", checkpoints / "original"
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    bad = [
        ((model, "--text", text, "--dataset", "x"), ConfigError, "not both"),
        ((model, "--dtype", "bf61"), ConfigError, 'Did you mean "bf16"'),
        ((model, "--contexts", "512,1x"), ConfigError, '"1x" is not a number of tokens'),
        ((model, "--text", tmp_path / "none.txt"), ConfigError, "cannot read the text file"),
        ((model, "--text", tmp_path / "latin.txt"), ConfigError, "UTF-8"),
        ((model, "--text", text, "--contexts", "8k"), ConfigError, "needs at least 8192"),
        ((model, "--baseline", tmp_path / "none.json"), ConfigError, "cannot read the evaluation"),
        ((tmp_path / "nowhere",), ConfigError, "no model at"),
        ((tmp_path / "nowhere", "--baseline", model, "--contexts", "8", "--text", text), ConfigError, "no model at"),
        ((tmp_path / "broken", "--contexts", "8", "--text", text), NumericsError, "non-finite NLL"),
    ]
    for arguments, kind, message in bad:
        found = run(*arguments, "--out", tmp_path / "out")
        assert isinstance(found.exception, kind), (arguments, found.exception)
        assert message in str(found.exception), (arguments, found.exception)
    assert not (tmp_path / "out").exists()


def test_sizes():
    assert [parse_size(text) for text in ("512", " 8k", "16K", "1m")] == [512, 8192, 16384, 1 << 20]
    for text in ("", "k", "0", "-1", "1.5k", "²", "1kk"):
        with pytest.raises(ConfigError, match="not a number of tokens"):
            parse_size(text)


def test_data_sets_are_read_from_local_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(
        '{"text": "one", "n": 1}\n{"text": "", "n": 2}\n{"text": "two", "n": 3}\n'
    )
    assert read_dataset(str(tmp_path / "data")) == ["one", "two"]
    (tmp_path / "data" / "test.jsonl").write_text('{"a": "one", "b": "x"}\n')
    with pytest.raises(ConfigError, match="no column"):
        read_dataset(str(tmp_path / "data"))
    with pytest.raises(ConfigError, match="cannot load the data set"):
        read_dataset(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="cannot read"):
        read_text(tmp_path)
