"""What the training tests share: a byte-level tokenizer, tiny models, documents and a recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from attnswap.training import parse_config, train
from attnswap.training.trainer import StepLog
from tests.helpers.paths import ROOT

VOCABULARY = 260


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A token for every byte, after ``<s>``, ``</s>`` and two spare ones."""
    tokens = ["<s>", "</s>", "<a>", "<b>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = chat_template
    return tokenizer


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def tiny_llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()


def tiny_gemma2() -> PreTrainedModel:
    """With final logits capped so low that leaving the cap out would show."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, final_logit_softcapping=0.5, sliding_window=16, query_pre_attn_scalar=8)
    return Gemma2ForCausalLM(config).eval()


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0)
    ).eval()


def documents(count: int = 12) -> list[str]:
    """Different documents of 40 to 240 characters with a pattern that a tiny model learns in a few steps."""
    return [f"{i} " + "the cat sat on the mat. " * (1 + (i * 7) % 10) + "x" * (i % 5) for i in range(count)]


def write_model(directory: Path, model: PreTrainedModel | None = None) -> Path:
    """Saves a tiny model with its tokenizer."""
    (model or tiny_llama()).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def recipe(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A run of ten steps on a tiny model and a text file; ``training`` and ``data`` are merged, the rest replaced."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    if not model.exists():
        write_model(model)
        text.write_text("\n\n".join(documents()), encoding="utf-8")
    training = {
        "max_steps": 10,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "use_cpu": True,
    }
    data = {
        "source": "files",
        "files": [str(text)],
        "documents": "paragraph",
        "sequence_length": 64,
        "eval_fraction": 0.2,
        "cache_dir": str(tmp_path / "cache"),
    }
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"reference": str(model)},
        **changes,
        "training": training | changes.get("training", {}),
        "data": data | changes.get("data", {}),
    }


def logged(directory: Path, key: str) -> list[float]:
    """Returns what a run logged under a key."""
    return [entry[key] for entry in map(json.loads, (directory / "steps.jsonl").open()) if key in entry]


def spawn(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a python command in a process of its own, from the repository's root."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, *command]
    return subprocess.run(
        whole, cwd=ROOT, env=os.environ | own | environment, capture_output=True, text=True, timeout=400
    )


def accelerate(processes: int, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script and its arguments in several processes."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
    return spawn(*launch, "--main_process_port", "0", *command, **environment)


def stop_at(step: int, original: Any) -> Any:
    """Returns a callback's method that does as before, and at a step ends the run as Ctrl-C would."""

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    return stop


def cut_off(values: dict[str, Any], step: int) -> None:
    """Runs a recipe and ends it at a step as Ctrl-C would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLog, "on_log", stop_at(step, StepLog.on_log))
        with pytest.raises(KeyboardInterrupt):
            train(parse_config(values))
