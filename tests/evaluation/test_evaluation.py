"""What an evaluation scores: windows, losses, bytes and errors, against brute force."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.implementations import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import attnswap
from attnswap.errors import ConfigError, NumericsError, UnsupportedModelError
from attnswap.evaluation import evaluate_perplexity
from attnswap.evaluation.corpus import load_corpus
from attnswap.evaluation.estimate import Growth, duration
from attnswap.evaluation.lm_head import head_logits
from attnswap.evaluation.scoring import Scorer
from attnswap.evaluation.windows import plan
from attnswap.text import evaluation_text

TEXT = evaluation_text()[:900]
CONTEXTS = (8, 15, 32)

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "mistral": MistralConfig(**TINY, sliding_window=6),
    "qwen3": Qwen3Config(**TINY, head_dim=8),
    "gemma2": Gemma2Config(**TINY, head_dim=8, sliding_window=6, final_logit_softcapping=0.5),
    "gpt_oss": GptOssConfig(**TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "llama4": Llama4TextConfig(
        **TINY, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=6, no_rope_layers=[1, 0]
    ),
    "gpt2": GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in TINY.items() if k != "num_key_value_heads"}),
}


def build(arch: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[arch])).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([evaluation_text()[:50_000]], vocab_size=300, special_tokens=["<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained.to_str()), bos_token="<s>")


@pytest.fixture(scope="module")
def without_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def loss(model: PreTrainedModel, read: list[int], target: int) -> float:
    """NLL of one token after the tokens read, from a full forward of its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([read])).logits[0, -1].double()
    return -torch.log_softmax(logits, dim=-1)[target].item()


@pytest.mark.parametrize("bos", [True, False])
def test_every_loss_equals_a_forward_of_its_own(bos, tokenizer, without_bos):
    model, tok = build(), tokenizer if bos else without_bos
    ids = tok(TEXT, add_special_tokens=False)["input_ids"]
    found = evaluate_perplexity(
        model, tok, text=TEXT, contexts=CONTEXTS, max_tokens=77, batch_size=3, positions=False, quiet=True
    )
    assert (found.protocol.prefix_id is not None) == bos
    start = 32 // 2
    scored_text = tok.decode(ids[start : start + 77])
    for length in CONTEXTS:
        half = length // 2
        expected = []
        for token in range(start, start + 77):
            window = (token - start) // half
            begin = start + window * half - (length - half)
            assert token - begin >= half
            assert token - begin < length
            read = ([0] if bos else []) + ids[begin:token]
            assert len(read) <= length
            expected.append(loss(model, read, ids[token]))
        np.testing.assert_allclose(found.nll[length], expected, atol=2e-5)
        metrics = found.at(length)
        assert metrics.nll == pytest.approx(np.mean(expected), abs=1e-5)
        assert metrics.ppl == pytest.approx(math.exp(metrics.nll))
        assert metrics.bpb == pytest.approx(sum(expected) / math.log(2) / len(scored_text.encode()), abs=1e-5)
        assert found.nll[length].dtype == np.float32
    # Contexts do matter to this model, so the agreement above is not one of equal numbers.
    assert np.abs(found.nll[8] - found.nll[32]).max() > 1e-2


def test_the_whole_text_is_scored_by_default(tokenizer):
    corpus = load_corpus(tokenizer, TEXT)
    found = evaluate_perplexity(build(), tokenizer, text=TEXT, contexts=[32], positions=False, quiet=True)
    assert found.protocol.scored_tokens == len(corpus.ids) - 16 == len(found.nll[32])
    assert found.protocol.scored_bytes == len(TEXT.encode()) - len(tokenizer.decode(corpus.ids[:16]).encode())


@pytest.mark.parametrize("tokens", [32, 33, 47, 48, 49, 200])
@pytest.mark.parametrize("stride", [None, 1, 5, 8, 31, 32, 100])
def test_each_token_is_scored_once_and_no_window_is_overfull(tokens, stride, tokenizer):
    corpus = load_corpus(tokenizer, TEXT)
    protocol = plan(corpus, tokenizer, [2, 3, 8, 31, 32], stride, max_tokens=tokens)
    for length in protocol.contexts:
        windows = protocol.windows(length)
        scored = [token for window in windows for token in range(window.first, window.end)]
        assert scored == list(range(protocol.first_token, protocol.first_token + tokens))
        for window in windows:
            read = window.inputs(corpus.ids, protocol.prefix_id)
            assert len(read) == window.fed <= length
            assert window.begin >= 0
            assert window.scored <= window.fed
            if stride is None:
                assert window.first - window.begin >= length / 2


def rolling(tokens: list[int], prefix: int, length: int, context: int) -> list[tuple[list[int], list[int]]]:
    """lm-eval's rolling windows, made disjoint, from its description: (context fed but not scored, scored)."""
    pairs, done = [], min(length, len(tokens))
    pairs.append(([prefix], tokens[:done]))
    while done < len(tokens):
        new = min(len(tokens) - done, length - context + 1)
        end = done + new
        pairs.append((tokens[end - length - 1 : end - 1][: length - new + 1], tokens[done:end]))
        done = end
    return pairs


def test_lm_evals_windows_spelled_out(tokenizer):
    corpus = load_corpus(tokenizer, TEXT)
    windows = plan(corpus, tokenizer, [10], stride=10, max_tokens=34).windows(10)
    read = [list(range(window.begin, window.end - 1)) for window in windows]
    assert read == [list(range(9)), list(range(9, 19)), list(range(19, 29)), list(range(23, 33))]
    assert [(window.first, window.end) for window in windows] == [(0, 10), (10, 20), (20, 30), (30, 34)]
    assert [window.prefix for window in windows] == [True, False, False, False]


@pytest.mark.parametrize("stride", [8, 32, 3])
def test_a_stride_gives_lm_evals_windows(stride, tokenizer):
    model = build()
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:101]
    found = evaluate_perplexity(
        model, tokenizer, text=TEXT, contexts=[8, 32], stride=stride, max_tokens=101, positions=False, quiet=True
    )
    assert found.protocol.name == "lm-eval"
    for length in (8, 32):
        expected = []
        for context, scored in rolling(ids, 0, length, length - min(stride, length) + 1):
            expected += [loss(model, context + scored[:i], token) for i, token in enumerate(scored)]
        np.testing.assert_allclose(found.nll[length], expected, atol=2e-5)


def test_position_curve_averages_disjoint_windows(tokenizer, without_bos):
    model = build()
    for tok, first in ((tokenizer, 0), (without_bos, 1)):
        ids = tok(TEXT, add_special_tokens=False)["input_ids"]
        found = evaluate_perplexity(model, tok, text=TEXT, contexts=[8, 24], max_tokens=64, quiet=True)
        buckets = [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 23)][first:]
        assert [(entry.lo, entry.hi) for entry in found.position_nll] == buckets
        for entry in found.position_nll:
            expected = [
                loss(model, [0] * (1 - first) + ids[begin : begin + position], ids[begin + position])
                for begin in (0, 24, 48)
                for position in range(entry.lo, entry.hi + 1)
            ]
            assert entry.n == len(expected)
            assert entry.nll == pytest.approx(np.mean(expected), abs=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_patched_model_is_scored_as_it_runs(arch, tokenizer):
    model, original = build(arch), build(arch)
    options = {"text": TEXT, "contexts": [32], "max_tokens": 32, "positions": False, "quiet": True}
    before = evaluate_perplexity(original, tokenizer, **options)
    attnswap.patch(model, "softpick")
    found = evaluate_perplexity(model, tokenizer, **options)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = [loss(model, [0, *ids[:token]], ids[token]) for token in range(16, 32)]
    np.testing.assert_allclose(found.nll[32][:16], expected, atol=1e-4)
    assert np.abs(found.nll[32] - before.nll[32]).max() > 1e-2
    assert before.swap is None
    assert "softpick" in json.dumps(found.swap)
    attnswap.unpatch(model)
    np.testing.assert_array_equal(evaluate_perplexity(model, tokenizer, **options).nll[32], before.nll[32])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_chunks_of_rows_equal_full_logits(arch, tokenizer):
    model = build(arch)
    inputs = torch.randint(1, 300, (2, 40))
    with torch.no_grad():
        full = model(input_ids=inputs).logits
    if arch == "gemma2":
        assert full.abs().max() <= 0.5
        assert (full.abs() > 0.45).any()
    scorer = Scorer(model, chunk_elements=300 * 2 * 7)
    seen, cached = [], []
    head = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    base = scorer.body.register_forward_hook(
        lambda _m, _a, kwargs, _o: cached.append(kwargs["use_cache"]), with_kwargs=True
    )
    with scorer.eval_no_grad():
        chunks = list(scorer.logit_chunks(inputs, 40))
        tail = torch.cat(list(scorer.logit_chunks(inputs, 10)), dim=1)
        nll = scorer.nll(inputs[:, :-1], inputs[:, 1:])
    head.remove()
    base.remove()
    assert [chunk.shape[1] for chunk in chunks] == [7] * 5 + [5]
    torch.testing.assert_close(torch.cat(chunks, dim=1), full, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tail, full[:, -10:], atol=1e-5, rtol=1e-5)
    expected = -torch.log_softmax(full[:, :-1].double(), -1).gather(2, inputs[:, 1:, None])[..., 0]
    torch.testing.assert_close(nll.double(), expected, atol=1e-5, rtol=1e-5)
    assert max(seen) == 7
    with scorer.eval_no_grad():
        scorer.check_scorable(inputs[0], [40])
    assert cached
    assert not any(cached)
    assert "forward" not in scorer.body.__dict__
    assert not scorer.body._forward_hooks


def test_the_head_runs_without_the_decoder_and_sees_its_attributes():
    class Tied(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids, **kwargs)[0]
            return CausalLMOutputWithPast(logits=hidden @ self.model.embed_tokens.weight.T)

    model, ids = Tied(ARCHITECTURES["llama"]).eval(), torch.arange(6)[None]
    with torch.no_grad():
        outputs, expected = model.model(ids, use_cache=False), model(ids).logits
        decoder, runs = model.model, []
        decoder.register_forward_pre_hook(lambda *_: runs.append("decoder"))
        torch.testing.assert_close(head_logits(model, outputs, outputs[0][:, 2:4]), expected[:, 2:4])
        model.register_forward_pre_hook(lambda *_: runs.append(type(model.model).__name__))
        torch.testing.assert_close(head_logits(model, outputs, outputs[0]), expected)
        assert runs == []
        torch.testing.assert_close(head_logits(model, outputs, outputs[0], forward=model), expected)
    assert runs == ["LlamaModel"], "hooks of the model, not of its decoder"
    assert model.model is decoder


def test_bf16_is_upcast_and_a_lora_wrapper_is_looked_through(tokenizer):
    peft = pytest.importorskip("peft")
    model = build().to(torch.bfloat16)
    options = {"text": TEXT, "contexts": [16], "positions": False, "quiet": True}
    plain = evaluate_perplexity(model, tokenizer, **options)
    assert plain.env["dtype"] == "bfloat16"
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor([[0]]), ids[:, :15]], dim=1)).logits
    expected = -torch.log_softmax(logits[0, 8:].float(), -1).gather(1, ids[0, 8:16, None])[:, 0]
    np.testing.assert_allclose(plain.nll[16][:8], expected, atol=5e-2)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    np.testing.assert_array_equal(evaluate_perplexity(wrapped, tokenizer, **options).nll[16], plain.nll[16])


def test_model_is_left_as_it_was(tokenizer):
    model = build().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    evaluate_perplexity(model, tokenizer, text=TEXT, contexts=[16], quiet=True)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()


def test_bytes_of_text_that_does_not_round_trip():
    words = {"[UNK]": 0, "cafe": 1, "and": 2, "tea": 3}
    lossy = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    lossy.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    lossy.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=lossy, unk_token="[UNK]")
    text = "Café   and 茶 😀 tea"
    corpus = load_corpus(tokenizer, text)
    assert corpus.ids.tolist() == [1, 2, 0, 0, 3]
    assert corpus.byte_ends.tolist() == [len(text[:end].encode()) for end in (4, 10, 12, 14, 18)]
    assert corpus.bytes_between(0, 5) == len(text.encode())
    assert corpus.bytes_between(2, 4) == len(" 茶 😀".encode())


def test_bytes_of_characters_split_over_tokens(tokenizer):
    text = "naïve 茶 😀😀 end"
    corpus = load_corpus(tokenizer, text)
    count = len(corpus.ids)
    assert count > len(text)
    assert corpus.bytes_between(0, count) == len(text.encode())
    assert sum(corpus.bytes_between(i, i + 1) for i in range(count)) == len(text.encode())
    spelled = [len(token) for token in tokenizer.convert_ids_to_tokens(corpus.ids.tolist())]
    assert np.abs(np.cumsum(spelled) - corpus.byte_ends).max() <= 3  # at most the rest of one character


def test_documents_are_joined_by_a_blank_line(tokenizer):
    corpus = load_corpus(tokenizer, ["one", "two"])
    assert corpus.text == "one\n\ntwo"
    assert tokenizer.decode(corpus.ids) == corpus.text
    assert load_corpus(tokenizer).id == "pydoc-topics"


def test_short_text_and_bad_arguments_are_refused(tokenizer, without_bos):
    model, short = build(), TEXT[:40]
    has = len(load_corpus(tokenizer, short).ids)
    with pytest.raises(ConfigError, match=f"has {has} tokens but the largest context needs at least {has + 1}"):
        evaluate_perplexity(model, tokenizer, text=short, contexts=[4, has + 1], quiet=True)
    evaluate_perplexity(model, tokenizer, text=short, contexts=[4, has], quiet=True)
    bad = [
        ({"contexts": []}, "at least 2"),
        ({"contexts": [1]}, "at least 2"),
        ({"stride": 0}, "stride"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"contexts": [16], "stride": 16, "max_tokens": 8}, "max_tokens is 8"),
        ({"text": ""}, "empty"),
    ]
    for options, message in bad:
        with pytest.raises(ConfigError, match=message):
            evaluate_perplexity(model, tokenizer, **{"text": TEXT, "contexts": [8], "quiet": True, **options})
    with pytest.raises(ConfigError, match="BOS or EOS"):
        evaluate_perplexity(model, without_bos, text=TEXT, contexts=[8], stride=8, quiet=True)


def test_unsuitable_models_are_refused(tokenizer):
    with pytest.raises(UnsupportedModelError, match="LlamaModel"):
        evaluate_perplexity(LlamaModel(ARCHITECTURES["llama"]), tokenizer, text=TEXT, contexts=[8], quiet=True)
    with pytest.raises(ConfigError, match="128 learned positions"):
        evaluate_perplexity(build("gpt2"), tokenizer, text=TEXT * 2, contexts=[8, 256], quiet=True)
    seeing = build()
    seeing.model.vision_tower = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(4, 4)})
    Scorer(seeing).check_positions(32)  # pictures have positions of their own
    prompted = get_peft_model(build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedModelError, match="learned prompt"):
        evaluate_perplexity(prompted, tokenizer, text=TEXT, contexts=[8], quiet=True)

    class PeeksAtTheInput(type(build())):
        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = out.logits + input_ids.sum()
            return out

    encoder = BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=300)
    with pytest.raises(UnsupportedModelError, match="depend on later tokens"):
        evaluate_perplexity(AutoModelForCausalLM.from_config(encoder), tokenizer, text=TEXT, contexts=[8], quiet=True)
    with pytest.raises(UnsupportedModelError, match="in chunks"):
        evaluate_perplexity(PeeksAtTheInput(ARCHITECTURES["llama"]), tokenizer, text=TEXT, contexts=[8], quiet=True)


def test_a_non_finite_loss_names_its_window(tokenizer):
    model = build()
    corpus = load_corpus(tokenizer, TEXT)
    # These 23 tokens are read together in one window only.
    poisoned = corpus.ids[177:200]

    def poison(_module, args, kwargs, output):
        ids = kwargs["input_ids"][0]
        if any(torch.equal(ids[i : i + 23], poisoned) for i in range(len(ids) - 22)):
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    handle = model.model.register_forward_hook(poison, with_kwargs=True)
    with pytest.raises(NumericsError, match="window of tokens 176 to 207"):
        evaluate_perplexity(model, tokenizer, text=TEXT, contexts=[32], max_tokens=256, positions=False, quiet=True)
    handle.remove()
    assert not model.model._forward_hooks
    assert "forward" not in model.model.__dict__


def test_contexts_beyond_the_trained_length_are_noted(tokenizer, capsys):
    found = evaluate_perplexity(build(), tokenizer, text=TEXT * 2, contexts=[16, 256], max_tokens=32, positions=False)
    assert found.notes == ["warning: context 256 is beyond the model's max_position_embeddings of 128"]
    printed = capsys.readouterr()
    assert "estimate:" in printed.err
    assert found.notes[0] in printed.err
    assert not printed.out


def test_growth_recovers_a_law_and_drops_negative_parts():
    law = Growth(2.0, 0.5)
    fitted = Growth.fit((256, 1024), (law.at(256), law.at(1024)))
    assert fitted.at(8192) == pytest.approx(law.at(8192))
    assert Growth.fit((256, 1024), (300.0, 1000.0)) == Growth(1000 / 1024, 0.0)
    assert Growth.fit((256, 1024), (1.0, 1000.0)).linear == 0.0
    assert Growth.fit((64, 64), (1.0, 2.0)) == Growth(2 / 64, 0.0)
    assert [duration(s) for s in (4.2, 200, 7500)] == ["4 s", "3 min 20 s", "2 h 5 min"]
