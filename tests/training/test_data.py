"""Windows hold documents that cannot see each other; what is evaluated is never trained on."""

import gzip
import json
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import attnswap
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.healing.experiment import Experiment
from attnswap.healing.run import _check_inputs
from attnswap.loading import load_tokenizer
from attnswap.training import load_data, parse_config
from attnswap.training.chat import encode_conversation
from attnswap.training.config import DataSection
from attnswap.training.data import load_documents, split_documents
from attnswap.training.inputs import gather_inputs
from attnswap.training.packing import IGNORED, Document, check_separation, pack
from tests.helpers.tiny_models import tiny
from tests.helpers.training import byte_tokenizer, documents, recipe, tiny_gemma2, tiny_llama


def windows(lengths: list[int], length: int, bos: int | None, whole: bool = False) -> list[dict[str, list[int]]]:
    """Packs documents whose tokens are all different: document d has tokens 1000 d + 10, 1000 d + 11, ..."""
    made = [[1000 * d + 10 + i for i in range(n)] for d, n in enumerate(lengths)]
    return list(pack([Document(ids, ids) for ids in made], length, bos=bos, pad=1, cut_documents=not whole))


def pieces(window: dict[str, list[int]]) -> list[slice]:
    """Cuts a window where position ids restart."""
    starts = [i for i, position in enumerate(window["position_ids"]) if position == 0]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(window["input_ids"])], strict=True)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=8), st.integers(2, 24), st.booleans(), st.booleans())
def test_packing_keeps_documents_apart(lengths: list[int], length: int, with_bos: bool, whole: bool) -> None:
    bos = 0 if with_bos else None
    learned: list[int] = []
    for window in windows(lengths, length, bos, whole):
        assert {len(values) for values in window.values()} == {length}
        assert any(label != IGNORED for label in window["labels"][1:])
        for piece in pieces(window):
            ids, labels = window["input_ids"][piece], window["labels"][piece]
            assert window["position_ids"][piece] == list(range(len(ids)))
            assert labels[0] == IGNORED
            assert len({token // 1000 for token in ids if token > 1}) <= 1, "one piece holds one document"
            assert bos is None or ids[0] == bos or set(ids) == {1}, "every piece that is not padding starts with BOS"
            assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
            learned += [label for label in labels if label != IGNORED]
    assert len(learned) == len(set(learned)), "no token is learned twice"
    if with_bos and not whole:  # the BOS takes the place of the unlearned first token, so nothing is lost
        assert len(learned) == sum(lengths)
    if whole:
        assert len(learned) == sum(max(0, min(n + with_bos, length) - 1) for n in lengths)


@pytest.mark.parametrize("swap", [None, "ssmax", "softpick", "forgetting-gate"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2], ids=["llama", "gemma2"])
def test_packed_documents_get_the_logits_they_get_alone(make: Any, swap: str | None) -> None:
    model = make()
    if swap:
        attnswap.patch(model, swap)
        with torch.no_grad():  # away from the identity start, where counting across a border would not show
            for parameter in attnswap.swap_parameters(model).values():
                parameter.add_(0.3)
    window = windows([20, 9, 40, 3], 48, bos=0)[0]
    rows = {key: torch.tensor([values]) for key, values in window.items()}
    rows["input_ids"] %= 260
    with torch.no_grad():
        packed = model(input_ids=rows["input_ids"], position_ids=rows["position_ids"], use_cache=False).logits[0]
        for piece in pieces(window):
            alone = model(input_ids=rows["input_ids"][:, piece], use_cache=False).logits[0]
            torch.testing.assert_close(packed[piece], alone, atol=1e-5, rtol=0)


def section(tmp_path: Path, **changes: Any) -> DataSection:
    defaults = {"source": "files", "files": [str(tmp_path / "*.txt*")], "documents": "paragraph", "sequence_length": 32}
    return DataSection(**(defaults | {"cache_dir": str(tmp_path / "cache"), "eval_fraction": 0.25} | changes))


def test_files_globs_gzip_and_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n \nthree\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("four\n\n\nfive")
    assert load_documents(section(tmp_path))["document"][:] == ["one", "two", "three\n", "four", "five"]
    assert len(load_documents(section(tmp_path, documents="file"))) == 2
    (tmp_path / "a.txt").write_text("changed, so the cache must not serve the old text")
    assert load_documents(section(tmp_path))["document"][0].startswith("changed")


def test_nothing_evaluated_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(documents(16) + documents(16)))  # every document twice
    split = section(tmp_path)
    train, held_out = split_documents(load_documents(split), split)
    assert not set(train["document"]) & set(held_out["document"])
    assert (len(train), len(held_out)) == (12, 4)
    again = split_documents(load_documents(split), split)
    assert again[0]["document"][:] == train["document"][:]
    other = section(tmp_path, seed=1)
    assert split_documents(load_documents(other), other)[1]["document"][:] != held_out["document"][:]

    data = load_data(split, byte_tokenizer())
    tokenizer = byte_tokenizer()
    text = "".join(tokenizer.decode(row["labels"][row["labels"] != IGNORED]) for row in data.held_out)
    assert text == "".join(held_out["document"])
    assert data.train[0]["input_ids"].shape == (32,)


def test_offline_text_is_split_by_file(tmp_path: Path) -> None:
    offline = DataSection(max_documents=6, eval_fraction=0.3, sequence_length=64, cache_dir=str(tmp_path))
    data = load_data(offline, byte_tokenizer())
    assert len(data.train) > len(data.held_out) > 10


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (None, {}, "no file matches"),
        ("only one", {}, "but needs two"),
        ("a\n\nb", {"documents": "file"}, "but needs two"),
        (b"\xff\xff", {}, "as UTF-8 text"),
        ("{}", {"kind": "chat"}, 'a.txt line 1: needs a list "messages"'),
        ('{"messages": [{"role": "user"}]}', {"kind": "chat"}, 'needs a text "role" and a text "content"'),
        ("not json", {"kind": "chat"}, "not valid JSON"),
        ("a\n\nb", {"source": "hub", "files": [], "name": "no/such-data"}, 'cannot load the data set "no/such-data"'),
    ],
)
def test_bad_data_is_refused(
    tmp_path: Path, content: str | bytes | None, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        load_data(section(tmp_path, **changes), byte_tokenizer())


def unlike(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """Documents that share no passage."""
    draw = random.Random(seed)
    return [" ".join(f"{draw.randrange(10**6)}" for _ in range(words)) for _ in range(count)]


def warned(tmp_path: Path, texts: list[str], **training: Any) -> list[str]:
    """What is said of a recipe on some documents."""
    values = recipe(tmp_path, swap="ssmax", training=training)
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gather_inputs(parse_config(values))
    return [str(one.message) for one in caught if str(one.message).startswith("data: ")]


def test_enough_and_different_text_is_passed_over_in_silence(tmp_path: Path) -> None:
    assert warned(tmp_path, unlike(40)) == []


@pytest.mark.parametrize(
    ("texts", "training", "message"),
    [
        (unlike(40) + unlike(40)[:15], {}, "15 documents repeat others and are left out; 32 are used for training"),
        (unlike(20), {"per_device_train_batch_size": 99, "gradient_accumulation_steps": 9}, "a step reads 891 windows"),
        (unlike(20), {"max_steps": 5000}, r"windows is read \d+ times"),
        (unlike(9, words=5), {}, r"over only \d+ tokens"),
        ([text + "  \n" + text for text in unlike(40)] + unlike(40), {}, r"\d+ of 64 passages .* the held-out"),
        (["a chapter " + " ".join(unlike(40)), *unlike(40)], {}, r"\d+ of 64 passages .* the held-out"),
    ],
    ids=["repeated texts", "a large step", "many steps", "short texts", "repeated passages", "all texts in one"],
)
def test_data_that_shows_or_teaches_little_is_mentioned(
    texts: list[str], training: dict[str, Any], message: str, tmp_path: Path
) -> None:
    said = warned(tmp_path, texts, **training)
    assert any(re.search(message, one) for one in said), said


def test_a_text_to_measure_on_that_was_trained_on_is_mentioned(tmp_path: Path) -> None:
    texts = unlike(40)
    (tmp_path / "text.txt").write_text("")
    values = recipe(tmp_path, swap="ssmax")
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    for text, leaks in ((" ".join(texts[:9]), True), (" ".join(unlike(9, seed=1)), False)):
        experiment = Experiment(parse_config(values), tmp_path / "out", text=text, contexts=(32, 96), max_tokens=64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _check_inputs(experiment, byte_tokenizer(), [replace(experiment.config, output_dir=str(tmp_path / "out"))])
        assert any("the text to measure on" in str(one.message) for one in caught) == leaks


CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello  there.\n"},
    {"role": "user", "content": "Add 2 and 2"},
    {"role": "assistant", "content": "4"},
]
MARKED = (
    "{% for m in messages %}{{ '<a>' + m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def learned_text(document: Document, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in document.labels if label != IGNORED], skip_special_tokens=False)


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


def test_chat_without_generation_markers(smollm2: PreTrainedTokenizerBase) -> None:
    document = encode_conversation(CHAT, smollm2)
    assert document.ids == smollm2.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
    assert learned_text(document, smollm2) == "Hello  there.\n<|im_end|>4<|im_end|>"


def test_chat_with_generation_markers() -> None:
    tokenizer = byte_tokenizer(MARKED)
    document = encode_conversation(CHAT, tokenizer)
    assert learned_text(document, tokenizer) == "Hello  there.\n</s>4</s>"


def test_chat_templates_that_hide_the_answer_are_refused(smollm2: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        encode_conversation(CHAT, byte_tokenizer())
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ConfigError, match="renders earlier messages differently"):
        encode_conversation(CHAT, byte_tokenizer(rewriting))
    with pytest.raises(ConfigError, match="cannot start with an assistant message"):
        encode_conversation(CHAT[1:], smollm2)


def test_chat_files_become_whole_conversations(tmp_path: Path, smollm2: PreTrainedTokenizerBase) -> None:
    lines = [json.dumps({"messages": [*CHAT[:3], {"role": "assistant", "content": str(i)}]}) for i in range(8)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    data = load_data(section(tmp_path, kind="chat", sequence_length=128), smollm2)
    rows = [row for part in (data.train, data.held_out) for row in part]
    text = "".join(smollm2.decode(row["labels"][row["labels"] != IGNORED]) for row in rows)
    assert sorted(text.replace("<|im_end|>", "").replace("Hello  there.\n", "")) == list("01234567")
    assert len(rows) == 4, "two conversations of 55 tokens to a window, and neither is cut"


def test_a_model_that_cannot_be_packed_is_refused():
    """transformers' gpt_oss does not look at position ids when it makes its masks; llama does."""
    check_separation(tiny("llama"))
    check_separation(tiny("gemma2"))
    with pytest.raises(UnsupportedModelError, match="pack: false"):
        check_separation(tiny("gpt_oss"))


def test_one_document_for_each_window():
    documents = [Document(list(range(10, 10 + n)), list(range(10, 10 + n))) for n in (5, 3, 20)]
    windows = list(pack(documents, 8, bos=1, pad=0, share_windows=False))
    assert [w["input_ids"][:2] for w in windows] == [[1, 10], [1, 10], [1, 10], [1, 17], [1, 24]]
    assert all(len(w["input_ids"]) == 8 for w in windows)
    assert [sum(label != -100 for label in w["labels"]) for w in windows] == [5, 3, 7, 7, 6]
