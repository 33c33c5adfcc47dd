"""What is loaded is the checkpoint's own: no weight is left at random."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

import attnswap
from attnswap.cli import main
from attnswap.errors import CheckpointError
from attnswap.loading import load_model
from tests.helpers.tiny_models import tiny, tiny_config
from tests.helpers.training import write_model

BERT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
QUERY = "model.layers.1.self_attn.q_proj.weight"


def drop(*names: str) -> Callable[[Path], None]:
    """Takes weights out of the files that hold them; an index goes on naming them."""

    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = {name: value for name, value in load_file(file).items() if name not in names}
            save_file(tensors, file, metadata={"format": "pt"})

    return change


def configure(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def lose_a_shard(folder: Path) -> None:
    (sorted(folder.glob("model-*")) or [folder / "model.safetensors"])[0].unlink()


DAMAGE = {
    "a weight": (drop(QUERY), rf"incomplete: it lacks the weight {QUERY}"),
    "a norm": (drop("model.norm.weight"), "lacks the weight model.norm.weight"),
    "the head": (drop("lm_head.weight"), "lacks the weight lm_head.weight"),
    "the embedding": (drop("model.embed_tokens.weight"), "lacks the weight model.embed_tokens.weight"),
    "a layer": (configure(num_hidden_layers=3), r"lacks \d+ weights such as model.layers.2"),
    "a swap's parameter": (drop("model.layers.0.self_attn.attnswap.ssmax.scale"), "ssmax.*scale"),
    "a shape": (configure(intermediate_size=40), r"do not fit its config.json: .*mlp.* \[32, 48\] for \[32, 40\]"),
}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("swap", [None, "ssmax"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_lacks_a_weight_is_refused(damage: str, swap: str | None, shard: str, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    if "swap" in damage and swap is None:
        pytest.skip("it has none")
    model = tiny("llama")
    if swap:
        attnswap.patch(model, swap)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    load_model(tmp_path)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("loaded", ["tied", "tied by the head"])
def test_tied_weights_are_not_missing(loaded: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    if loaded == "tied by the head":
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(load_model(tmp_path).get_output_embeddings().weight, model.get_input_embeddings().weight)
    drop("lm_head.weight", "model.embed_tokens.weight")(tmp_path)
    with pytest.raises(CheckpointError, match=r"lacks 2 weights such as lm_head\.weight"):
        load_model(tmp_path)


def test_a_missing_shard_and_a_body_without_a_head_are_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    lose_a_shard(tmp_path / "shards")
    with pytest.raises(CheckpointError, match=r"incomplete: .*model-00001-of"):
        load_model(tmp_path / "shards")
    tiny("llama").model.save_pretrained(tmp_path / "body")
    with pytest.raises(CheckpointError, match=r"lacks the weight lm_head\.weight"):
        load_model(tmp_path / "body")


def test_a_new_head_is_no_loss_where_it_is_asked_for(tmp_path: Path) -> None:
    """A patched model under a head of another task; what the saved model had must still be there."""
    model = tiny()
    attnswap.patch(model, "ssmax")
    model.save_pretrained(tmp_path)
    for load in (AutoModelForSequenceClassification, AutoModel):
        assert attnswap.describe(load.from_pretrained(tmp_path)).patched_layers == [0, 1]
    drop(QUERY)(tmp_path)
    for load in (AutoModelForSequenceClassification, AutoModel, AutoModelForCausalLM):
        with pytest.raises(CheckpointError, match=r"lacks the weight .*q_proj"):
            load.from_pretrained(tmp_path)


def test_a_pooler_that_a_masked_model_lacks_starts_anew(tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(**BERT))
    attnswap.patch(model, "ssmax")
    model.save_pretrained(tmp_path)
    assert attnswap.describe(AutoModelForSequenceClassification.from_pretrained(tmp_path)).patched_layers == [0]


def test_weights_that_stay_unused_are_mentioned(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    configure(num_hidden_layers=1)(tmp_path)
    with pytest.warns(UserWarning, match="does not use 9 weights such as model.layers.1"):
        load_model(tmp_path)


@pytest.mark.parametrize("command", [["eval"], ["inspect"], ["patch", "--swap", "ssmax", "OUT"]])
def test_the_command_line_refuses_it_in_one_line(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drop(QUERY)(write_model(tmp_path / "model", tiny("llama")))
    capsys.readouterr()
    words = [command[0], str(tmp_path / "model"), *(str(tmp_path / "out") if w == "OUT" else w for w in command[1:])]
    monkeypatch.setattr("sys.argv", ["attnswap", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"it lacks the weight {QUERY}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
