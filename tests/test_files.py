"""Users' text is read as it is: whatever ends a line elsewhere, byte-order marks, JSON lines, and formats refused."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from attnswap.errors import ConfigError
from attnswap.evaluation.corpus import read_text
from attnswap.evaluation.result import Evaluation
from attnswap.training.config import DataSection, load_config
from attnswap.training.data import load_documents

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]
BOM = b"\xef\xbb\xbf"
Reader = Callable[[Path], list[str]]


def trained_on(path: Path, **changes: str) -> list[str]:
    section = {"source": "files", "files": [str(path)], "cache_dir": str(path.parent / "cache")} | changes
    return list(load_documents(DataSection(**section))["document"])  # type: ignore[arg-type]


def said(path: Path) -> list[str]:
    return [json.loads(row)[0]["content"] for row in trained_on(path, kind="chat")]


def evaluated_on(path: Path) -> list[str]:
    return read_text(path).split("\n\n")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def rows(texts: list[str], end: str = "\n") -> bytes:
    """JSON lines that serve as texts and as conversations, unescaped as scraped data usually is."""
    made = [{"text": text, "messages": [{"role": "user", "content": text}]} for text in texts]
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in made).encode()


@pytest.mark.parametrize("read", [trained_on, said, evaluated_on])
@pytest.mark.parametrize("bom", [b"", BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.gz"])
def test_json_lines_end_at_line_feeds_alone(name: str, end: str, bom: bytes, read: Reader, tmp_path: Path) -> None:
    texts = [f"one{separator}two" if separator >= "\x7f" else "plain" + separator.strip() for separator in SEPARATORS]
    assert read(write(tmp_path / name, bom + rows(texts, end))) == texts


@pytest.mark.parametrize("read", [trained_on, evaluated_on])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a", "a.py"])
def test_a_byte_order_mark_is_no_text(name: str, read: Reader, tmp_path: Path) -> None:
    text = "{a}" + "".join(SEPARATORS) + "b"
    assert read(write(tmp_path / name, BOM + text.encode())) == [text]


def test_paragraphs_and_other_keys_of_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "one\\n\\ntwo"}\n{"body": "three"}\n')
    assert trained_on(path, column="body") == ["one\n\ntwo", "three"]
    assert trained_on(path, column="body", documents="paragraph") == ["one", "two", "three"]
    talk = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "b.jsonl", json.dumps({"turns": talk}).encode())
    assert json.loads(trained_on(path, kind="chat", column="turns")[0]) == talk


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}\n',
            r'line 2: must be an object with a string "text" .*body, id',
        ),
        ("a.jsonl", b'{"messages": []}\n', "for conversations, set"),
        ("a.jsonl", b'{"text": null}\n', 'must be an object with a string "text"'),
        ("a.jsonl", b'"bare"\n', r"\(a str\)"),
        ("a.jsonl", b'{"text": "a"\n', "line 1: not valid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: not valid JSON: .*surrogates"),
        ("a.txt", b'\n{"text": "a"}\n', r"rename it to \.jsonl"),
        ("a.txt", b'{"messages": []}\n', r"rename it to \.jsonl"),
        ("a.json", b'[{"text": "a"}]', r"is a \.json file"),
        ("a.CSV", b"text\na\n", r"is a \.csv file"),
        ("a.tsv.gz", b"text\na\n", r"is a \.tsv file"),
        ("a.parquet", b"PAR1", r"is a \.parquet file"),
        ("a.txt", "text".encode("utf-16"), "as UTF-8 text"),
        ("a.txt", "text".encode("utf-16-le"), "NUL"),
        ("a.txt", "é".encode("latin-1"), "as UTF-8 text"),
    ],
)
@pytest.mark.parametrize("read", [trained_on, evaluated_on])
def test_what_is_no_plain_text_is_refused_by_name(
    name: str, content: bytes, message: str, read: Reader, tmp_path: Path
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=message) as refused:
        read(path)
    assert name in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"not gzip", gzip.compress(b"text" * 99)[:-9], gzip.compress(b"text")[:12] + b"x"],
    ids=["no archive", "cut at its end", "damaged inside"],  # an archive begins with the time
)
def test_a_damaged_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(content)
    for read in (trained_on, evaluated_on):
        with pytest.raises(ConfigError, match=r"cannot read .*a\.txt\.gz"):
            read(tmp_path / "a.txt.gz")


def test_recipes_and_reports_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.yaml", BOM + b"output_dir: out\nswap: ssmax\n")
    assert load_config(recipe).swap == "ssmax"
    with pytest.raises(ConfigError, match="its schema is not"):
        Evaluation.load(write(tmp_path / "a.json", BOM + b"{}"))
