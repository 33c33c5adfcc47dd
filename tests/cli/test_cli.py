"""The command line: what it prints, and the exit code of each kind of error."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

import attnswap
from tests.helpers.tiny_models import SWAPS, tiny
from tests.helpers.training import byte_tokenizer, tiny_llama, write_model


@pytest.fixture
def checkpoint(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_list_and_describe(run):
    code, out, _ = run("list")
    assert code == 0
    assert all(swap in out for swap in SWAPS)
    listed = json.loads(run("list", "--json")[1])
    assert [row["name"] for row in listed] == [s.name for s in attnswap.list_swaps()]
    assert "eps_after_max_shift" in run("describe", "softpick")[1]
    assert run("list", "--markdown")[1].count("\n") == len(listed) + 2


def test_patch_saves_what_reloads(run, checkpoint, tmp_path, tokens):
    out = tmp_path / "deep" / "out"
    code, printed, _ = run(
        "patch", checkpoint, out, "--swap", "ssmax", "--option", "form=scale", "--layers", "1:", "--heads", "0,1"
    )
    assert code == 0
    assert "1 of 2 layers swapped" in printed
    model = AutoModelForCausalLM.from_pretrained(out)
    attnswap.patch(expected := tiny("llama"), attnswap.SSMax(form="scale"), layers=[1], heads=[0, 1])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert '"scale"' in run("describe", out, "--json")[1]
    before = sorted(p.name for p in out.iterdir())
    code, _, err = run("patch", checkpoint, out, "--swap", "ssmax")
    assert (code, err.count("\n")) == (2, 1)
    assert "exists already" in err
    assert sorted(p.name for p in out.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["describe", "sofpick"], 2, 'Did you mean "softpick"'),
        (["patch", "embedded", "x", "--swap", "sofpick"], 2, 'Did you mean "softpick"'),
        (["patch", "CHECKPOINT", "x", "--swap", "ssmax", "--option", "fom=scale"], 2, 'Did you mean "form"'),
        (["patch", "CHECKPOINT", "x", "--swap", "ssmax", "--layers", "7"], 2, "layer 7"),
        (["patch", "CHECKPOINT", "x", "--swap", "ssmax", "--heads", "a"], 2, "list of numbers"),
        (["patch", "./nowhere", "x", "--swap", "ssmax"], 2, "no model at"),
        (["eval", "./nowhere"], 2, "no model at"),
        (["patch", "./nowhere", "x", "--swap", "ssmax", "--dtype", "fp99"], 2, 'unknown dtype "fp99"'),
        (["patch", "./nowhere", "x", "--swap", "ssmax", "--ramp", "2"], 2, "ramp must be in"),
        (["patch", "./nowhere", "x"], 2, "--swap"),
        (["patch", "./nowhere", "x", "--swap", "ssmax", "--option", "name=softpick"], 2, "--swap names the swap"),
        (["eval", ""], 2, "the model reference is empty"),
        (["eval", "CHECKPOINT", "--batch-size", "0"], 2, "--batch-size"),
        (["eval", "CHECKPOINT", "--contexts", "9z"], 2, "not a number of tokens"),
        (["eval", "CHECKPOINT", "--device", "gpuu"], 2, 'unknown device "gpuu"'),
        (["eval", "CHECKPOINT", "--device", "xla"], 2, 'no device "xla"'),
        (["eval", "CHECKPOINT", "--batch-size", "two"], 2, "--batch-size"),
        (["eval"], 2, "MODEL"),
        (["describe", "nope/nope"], 2, '"nope/nope" is not a swap'),
        (["train", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["lst"], 2, "lst"),
    ],
)
def test_errors_are_one_line_with_their_code(run, checkpoint, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    found, _, err = run(*[str(checkpoint) if a == "CHECKPOINT" else a for a in arguments])
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert err.count("\n") == 1, "one line"
    assert not (tmp_path / "x").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_unsupported_model(run, tmp_path):
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    byte_tokenizer().save_pretrained(tmp_path / "mamba")
    code, _, err = run("patch", tmp_path / "mamba", tmp_path / "x", "--swap", "ssmax")
    assert code == 3
    assert "no attention module" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", ["[]", "{}", '{"model_type": "nothing"}', '{"model_type": "t5"}', "{"])
def test_damaged_configs(run, checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    code, _, err = run("eval", checkpoint, "--contexts", "32", "--max-tokens", "64")
    assert (code, err.count("\n")) == (2, 1), err


def test_text_shorter_than_the_context(run, checkpoint, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    code, _, err = run("eval", checkpoint, "--contexts", "64", "--text", tmp_path / "short.txt")
    assert code == 2
    assert "64" in err


def test_truncated_checkpoint(run, checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = run("patch", checkpoint, tmp_path / "x", "--swap", "ssmax")
    assert code == 2
    assert "complete" in err


def test_numerics(run, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    write_model(tmp_path / "nan", model)
    code, _, err = run("eval", tmp_path / "nan", "--contexts", "32", "--max-tokens", "64")
    assert code == 4
    assert err.strip().splitlines()[-1].startswith("error:")


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0
    assert "attnswap works here" in out


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "attnswap.cli", "describe", "ssmx"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
