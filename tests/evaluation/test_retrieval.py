"""Prompts are of the length and depth asked for, and their scores are those of the model's own logits."""

import random
import re

import pytest
import torch

import attnswap
from attnswap.errors import ConfigError, NumericsError, UnsupportedModelError
from attnswap.evaluation.quantize import round_to_nearest, rounded
from attnswap.evaluation.retrieval import TASKS, _Builder, measure_retrieval
from tests.helpers.training import byte_tokenizer, tiny_gpt2, tiny_llama

LENGTH = 400


def text_of(ids: torch.Tensor) -> str:
    return byte_tokenizer().decode(ids, skip_special_tokens=True)


def place_of(part: str, ids: torch.Tensor) -> int:
    wanted = byte_tokenizer()(part, add_special_tokens=False)["input_ids"]
    return next(i for i in range(len(ids)) if ids[i : i + len(wanted)].tolist() == wanted)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompts_have_their_length_and_hide_the_answer_at_its_depth(task: str, depth: float) -> None:
    builder = _Builder(byte_tokenizer(), seed=3)
    for index in range(5):
        ids, answer = builder.build(task, LENGTH, depth, index)
        assert len(ids) == LENGTH
        assert ids[0] == 0, "BOS comes first"
        assert torch.equal(ids[-len(answer) :], answer)
        text, key = text_of(ids), text_of(answer).strip()
        assert re.fullmatch(r"\d{5}", key)
        prompt = TASKS[task][0](random.Random(f"3 {task} {LENGTH} {depth} {index}"))
        first = place_of(prompt.hidden[prompt.wanted], ids)  # not in the text, whose characters may take two tokens
        room = LENGTH - 1 - sum(len(h) for h in prompt.hidden) - len(prompt.question) - len(prompt.answer)
        others = 1 + sum(len(h) for h in prompt.hidden if place_of(h, ids) < first)
        assert abs(first - others - room * depth) <= 1
        assert text.endswith(prompt.question + prompt.answer)
        assert all(hidden in text for hidden in prompt.hidden)
        if task == "variables":
            assert [text.index(h) for h in prompt.hidden] == sorted(text.index(h) for h in prompt.hidden)


def test_the_question_can_be_answered_in_one_way_only() -> None:
    builder = _Builder(byte_tokenizer(), seed=0)
    for index in range(20):
        ids, answer = builder.build("recall", 900, 0.3, index)
        text = text_of(ids)
        question = text[: -len(answer)].rpartition("\n")[2]
        assert text[: -len(answer)].count(question) == 2, "once in the list, once as the question"


def test_the_same_seed_asks_the_same_and_another_one_asks_another() -> None:
    one, two, other = (_Builder(byte_tokenizer(), seed=s) for s in (0, 0, 1))
    assert torch.equal(one.build("needle", LENGTH, 0.5, 2)[0], two.build("needle", LENGTH, 0.5, 2)[0])
    assert not torch.equal(one.build("needle", LENGTH, 0.5, 2)[0], other.build("needle", LENGTH, 0.5, 2)[0])


@pytest.mark.parametrize("swap", [None, "softpick"])
def test_scores_are_those_of_the_full_logits(swap: str | None) -> None:
    model, tokenizer = tiny_llama(max_position_embeddings=512), byte_tokenizer()
    if swap:
        attnswap.patch(model, swap)
    (cell,) = measure_retrieval(model, tokenizer, tasks=["needle"], lengths=[200], depths=[0.5], n=2, seed=1)
    logprobs, ranks, exact = [], [], []
    for index in range(2):
        ids, answer = _Builder(tokenizer, 1).build("needle", 200, 0.5, index)
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        own = log_p[torch.arange(len(answer)), answer]
        rank = (log_p > own[:, None]).sum(-1) + 1
        logprobs.append(own.sum().item())
        ranks.append(rank.double().log().mean().exp().item())
        exact.append(float((log_p.argmax(-1) == answer).all()))
    assert cell.logprob == pytest.approx(sum(logprobs) / 2, rel=1e-5)
    assert cell.rank == pytest.approx(sum(ranks) / 2, rel=1e-6)
    assert cell.accuracy == pytest.approx(sum(exact) / 2)


def test_a_model_that_knows_the_answer_matches_exactly() -> None:
    model, tokenizer = tiny_llama(max_position_embeddings=512), byte_tokenizer()
    builder = _Builder(tokenizer, 0)
    ids, answer = builder.build("passkey", 200, 0.5, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(ids[None, :-1]).logits[0, -len(answer) :], answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (cell,) = measure_retrieval(model, tokenizer, tasks=["passkey"], lengths=[200], depths=[0.5], n=1)
    assert (cell.accuracy, cell.rank) == (1.0, 1.0)
    assert model.training, "its training mode is restored"


def test_equals_come_in_the_order_of_greedy_decoding_and_nan_is_an_error() -> None:
    model, tokenizer = tiny_llama(max_position_embeddings=512), byte_tokenizer()
    ask = {"tasks": ["passkey"], "lengths": [200], "depths": [0.5], "n": 1}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (cell,) = measure_retrieval(model, tokenizer, **ask)
    answer = _Builder(tokenizer, 0).build("passkey", 200, 0.5, 0)[1]
    assert cell.accuracy == 0.0, "all logits are equal, and greedy decoding takes token 0"
    assert cell.rank == pytest.approx((answer + 1).double().log().mean().exp().item())
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NumericsError, match="passkey"):
        measure_retrieval(model, tokenizer, **ask)


def test_what_cannot_be_asked_is_refused() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    for options, words in (
        ({"tasks": ["nothing"]}, "unknown task"),
        ({"depths": [1.5]}, "between 0 and 1"),
        ({"lengths": [40]}, "too few"),
        ({"lengths": []}, "needs tasks"),
        ({"n": 0}, "at least 1 prompt"),
    ):
        with pytest.raises(ConfigError, match=words):
            measure_retrieval(model, tokenizer, **{"tasks": ["passkey"], "lengths": [200], "n": 1, **options})


# --- rounded weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_weights_are_rounded_to_the_nearest_level_of_their_group(bits: int) -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    found, top = round_to_nearest(weight, bits), 2 ** (bits - 1) - 1
    for row in range(6):
        for start in (0, 64):
            part, ours = weight[row, start : start + 64], found[row, start : start + 64]
            scale = part.abs().max() / top
            levels = scale * torch.arange(-top, top + 1)
            nearest = levels[(part[:, None] - levels).abs().argmin(-1)]
            torch.testing.assert_close(ours, nearest, atol=1e-6, rtol=1e-5)
    assert torch.equal(round_to_nearest(torch.zeros(2, 64), bits), torch.zeros(2, 64))
    assert round_to_nearest(torch.randn(3, 50), bits).shape == (3, 50)


def test_rounding_knows_the_layers_of_gpt2_and_refuses_a_model_without_any() -> None:
    model = tiny_gpt2()
    weight = model.transformer.h[0].mlp.c_fc.weight  # (in, out)
    before = weight.clone()
    with rounded(model, 4) as count:
        assert torch.equal(weight, round_to_nearest(before.T, 4).T)
        assert count == sum(p.numel() for name, p in model.named_parameters() if ".c_" in name and p.ndim == 2)
    assert torch.equal(weight, before)
    with pytest.raises(UnsupportedModelError, match="no linear layers"), rounded(torch.nn.LayerNorm(3), 4):
        pass


def test_weights_of_few_bits_are_not_rounded_again() -> None:
    model = tiny_llama()
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.ones(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="already quantized"), rounded(model, 4):
        pass


def test_rounding_lasts_as_long_as_the_context_and_spares_head_and_swap() -> None:
    model, ids = tiny_llama(), torch.arange(4, 40)[None]
    attnswap.patch(model, {"name": "sigmoid", "bias": "predicted"})
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = model(ids).logits
    with rounded(model, 4) as count:
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert not torch.allclose(model(ids).logits, logits, atol=1e-4)
    linear = {name for name in before if "proj" in name}
    assert changed == linear
    assert count == sum(before[name].numel() for name in linear)
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(RuntimeError), rounded(model, 8):
        raise RuntimeError
    assert torch.equal(model(ids).logits, logits)
    with pytest.raises(ConfigError, match="between 2 and 8"), rounded(model, 16):
        pass
