"""A patched model goes into lm-evaluation-harness as it is: rolling perplexity, multiple choice and generation."""

import json
import math
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import lm_eval
import pytest
import torch
from accelerate.state import AcceleratorState
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import attnswap
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import SWAPS
from tests.helpers.training import byte_tokenizer, tiny_llama, write_model

LENGTH = 32
MIX = {"softpick": [0, 1], "ssmax": [2]}
# Characters of several bytes, and a last window that is not full.
TEXT = "The càt sat on the mat — and the dog did not; 12 birds 🐦 looked on. " * 4
PROMPTS = ["The cat sat on the", "A dog", "Twelve birds looked on, and not one of them", "So"]
CHOICES = ["a", "b", "mat", "mat, and the dog did not"]  # " a" and " b" share one forward in lm-eval
NEW = 12


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # lm-eval swallows some of its own connection errors, so attempts are counted besides being refused.
    attempts: list[Any] = []

    def refuse(*address: Any, **_: Any) -> None:
        attempts.append(address)
        raise OSError(f"no network here: {address}")

    # What HF_HUB_OFFLINE=1 sets, for runs outside make: else datasets reports the loading of a local file to a server.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not attempts


def build(swap: Any) -> PreTrainedModel:
    """A model with weights so large that a swap shows, with the swap's parameters moved away from identity."""
    model = tiny_llama(initializer_range=0.3)
    if swap is not None:
        attnswap.patch(model, swap)
        move_away(model, LENGTH)
    return model


def task(directory: Path, output_type: str, documents: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """An lm-eval task over a local file, as its YAML files describe one; it is named after its output type."""
    path = directory / f"{output_type}.json"
    path.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    return {
        "task": output_type,
        "output_type": output_type,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
        **fields,
    }


def rolling(directory: Path, texts: list[str]) -> dict[str, Any]:
    """The task wikitext of lm-eval on other texts."""
    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    documents = [{"text": text} for text in texts]
    return task(
        directory, "loglikelihood_rolling", documents, doc_to_text="", doc_to_target="text", metric_list=metrics
    )


def choosing(directory: Path, gold: list[int]) -> dict[str, Any]:
    documents = [{"prompt": prompt, "choices": CHOICES, "gold": right} for prompt, right in zip(PROMPTS, gold)]
    fields = {"doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "gold"}
    return task(directory, "multiple_choice", documents, **fields)


def generating(directory: Path, until: list[str], answers: list[str]) -> dict[str, Any]:
    documents = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(PROMPTS, answers)]
    settings = {"until": until, "max_gen_toks": NEW, "do_sample": False}
    fields = {"doc_to_text": "prompt", "doc_to_target": "answer", "generation_kwargs": settings}
    return task(directory, "generate_until", documents, **fields, metric_list=[{"metric": "exact_match"}])


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    """Decodes each byte to a character of its own: what random models write is no UTF-8, and much would look alike."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def harness(model: PreTrainedModel, batch_size: int) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer_of_characters(), max_length=96, batch_size=batch_size)


def run(lm: HFLM, *tasks: dict[str, Any]) -> Any:
    # What only takes time: an index of lm-eval's own thousands of tasks, standard errors, a listing by pip.
    own = TaskManager(include_defaults=False)
    with mock.patch("lm_eval.evaluator.add_env_info"):
        return lm_eval.simple_evaluate(lm, tasks=list(tasks), task_manager=own, bootstrap_iters=0)


def metric(results: Any, output_type: str, name: str) -> float:
    return results["results"][output_type][f"{name},none"]


def responses(results: Any, output_type: str) -> list[Any]:
    """What the model answered to each request of each document."""
    return [[answer for (answer,) in document["resps"]] for document in results["samples"][output_type]]


def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> float:
    found = attnswap.evaluate_perplexity(
        model, tokenizer, text=TEXT, contexts=(LENGTH,), stride=LENGTH, quiet=True, positions=False
    )
    assert found.protocol.scored_tokens > 8 * LENGTH and found.protocol.scored_tokens % LENGTH
    return found.metrics[0].bpb


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, and whether it is the greedy one: from the logits of a row on its own."""
    tokenizer = byte_tokenizer()
    ids, scored = tokenizer(context + continuation)["input_ids"], len(tokenizer(continuation)["input_ids"])
    rows = model(torch.tensor([ids]), use_cache=False).logits[0, -scored - 1 : -1].double().log_softmax(-1)
    targets = torch.tensor(ids[-scored:])
    return float(rows.gather(-1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: str) -> str:
    """A greedy continuation, by whole forwards of a row on its own without a cache."""
    tokenizer = tokenizer_of_characters()
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < NEW and tokenizer.eos_token_id not in new:
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("swap", [None, "softpick", "ssmax", MIX])
def test_rolling_bits_per_byte_are_those_of_evaluate_perplexity(swap: Any, tmp_path: Path) -> None:
    model, tokenizer = build(swap), byte_tokenizer()
    ours = bits_per_byte(model, tokenizer)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1)
    found = run(lm, rolling(tmp_path, [TEXT]))
    assert metric(found, "loglikelihood_rolling", "bits_per_byte") == pytest.approx(ours, abs=1e-6)
    assert math.log2(metric(found, "loglikelihood_rolling", "byte_perplexity")) == pytest.approx(ours, abs=1e-6)
    bits_per_word = math.log2(metric(found, "loglikelihood_rolling", "word_perplexity"))
    sizes = len(TEXT.encode()) / len(re.split(r"\s+", TEXT))
    assert bits_per_word / sizes == pytest.approx(ours, abs=1e-6)
    if swap is not None:  # a harness that ran softmax would be noticed
        assert abs(ours - bits_per_byte(build(None), tokenizer)) > 1e-3


def test_a_tokenizer_that_adds_bos_needs_add_bos_token_false(tmp_path: Path) -> None:
    model, tokenizer = build("softpick"), byte_tokenizer()
    ours = bits_per_byte(model, tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert bits_per_byte(model, tokenizer) == ours
    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, add_bos_token=False)
    found = run(lm, rolling(tmp_path, [TEXT]))
    assert metric(found, "loglikelihood_rolling", "bits_per_byte") == pytest.approx(ours, abs=1e-6)


def test_a_saved_model_loads_by_its_path(tmp_path: Path) -> None:
    model = build(MIX)
    path = write_model(tmp_path / "model", model)
    try:
        lm = HFLM(pretrained=str(path), device="cpu", max_length=LENGTH, batch_size=1)
        found = run(lm, rolling(tmp_path, [TEXT]))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # lm-eval's loading fills it for the whole process
    ours = bits_per_byte(model, byte_tokenizer())
    assert metric(found, "loglikelihood_rolling", "bits_per_byte") == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize("swap", [None, "softpick", "ssmax", MIX])
def test_choices_are_scored_as_from_the_logits(swap: Any, tmp_path: Path) -> None:
    model = build(swap)
    expected = [[log_likelihood(model, prompt, f" {choice}") for choice in CHOICES] for prompt in PROMPTS]
    scores = torch.tensor([[score for score, _ in document] for document in expected], dtype=torch.float64)
    best = scores.argmax(-1).tolist()
    gold = [best[0], best[1], best[2], (best[3] + 1) % len(CHOICES)]
    found = run(harness(model, batch_size=3), choosing(tmp_path, gold))
    for document, answers in zip(expected, responses(found, "multiple_choice"), strict=True):
        assert [score for score, _ in answers] == pytest.approx([score for score, _ in document], rel=1e-5)
        assert [first for _, first in answers] == [first for _, first in document]
    assert metric(found, "multiple_choice", "acc") == 0.75
    by_length = (scores / torch.tensor([len(choice) for choice in CHOICES])).argmax(-1)
    assert metric(found, "multiple_choice", "acc_norm") == float((by_length == torch.tensor(gold)).double().mean())
    if swap is not None:
        stock = build(None)
        assert abs(log_likelihood(stock, PROMPTS[0], f" {CHOICES[0]}")[0] - scores[0, 0]) > 1e-2


@pytest.mark.parametrize("swap", [None, "softpick", "ssmax", MIX])
def test_generation_is_greedy_decoding_of_each_prompt_alone(swap: Any, tmp_path: Path) -> None:
    model = build(swap)
    whole = [greedy(model, prompt) for prompt in PROMPTS]
    longest = max(range(len(whole)), key=lambda i: len(whole[i]))
    stop = whole[longest][5]
    expected = [text.split(stop)[0] for text in whole]
    found = run(harness(model, batch_size=2), generating(tmp_path, [stop], [*expected[:3], "not this"]))
    assert [answer for (answer,) in responses(found, "generate_until")] == expected
    assert metric(found, "generate_until", "exact_match") == 0.75
    assert len(expected[longest]) <= 5 < max(map(len, expected)), "a row of a batch ends while others go on"
    if swap is not None:
        assert whole != [greedy(build(None), prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("swap", [*SWAPS, MIX])
def test_padded_batches_give_the_numbers_of_single_rows(swap: Any, tmp_path: Path) -> None:
    model, found, read = build(swap), [], []
    texts = [TEXT[:70], TEXT[:15], TEXT[7:50], TEXT]
    tasks = [rolling(tmp_path, texts), choosing(tmp_path, [0, 1, 2, 3]), generating(tmp_path, ["\n\n"], [""] * 4)]

    def remember(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        read.append(args[0] if args else kwargs["input_ids"])

    model.register_forward_pre_hook(remember, with_kwargs=True)
    for size in (1, 2):
        read.clear()
        found.append(run(harness(model, batch_size=size), *tasks))
        assert max(map(len, read)) == size
    # lm-eval pads what it scores on the right, with 0 as is the prefix of rolling windows, and prompts left, with EOS.
    ends = {(int(ids[0]), int(ids[-1])) for batch in read if batch.shape[1] > 1 for ids in batch}
    assert (0, 0) in ends and any(first > 1 and last == 0 for first, last in ends)
    assert any(first == 1 for first, _ in ends)

    one, two = found
    for name in ("loglikelihood_rolling", "multiple_choice"):
        for alone, together in zip(responses(one, name), responses(two, name), strict=True):
            wanted, got = (torch.tensor(answers, dtype=torch.float64) for answers in (alone, together))
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-5)
    assert responses(one, "generate_until") == responses(two, "generate_until")
