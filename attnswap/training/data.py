"""Load documents, split them, and tokenize them into windows; ``datasets`` caches every step.

Held-out text is never trained on: repeated documents are removed first, and the split is by documents.
"""

import glob
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from attnswap import text
from attnswap.errors import ConfigError, first_line
from attnswap.files import parse_line, read_documents, read_lines, refuse_container
from attnswap.training.chat import as_conversation, encode_conversation
from attnswap.training.config import DataSection
from attnswap.training.packing import Document, pack

FORMAT = 2
"""Part of every cache key. Increase it if a change of the code gives other windows for the same recipe."""


@dataclass(frozen=True)
class Data:
    """Windows to train and evaluate on: torch rows of ``input_ids``, ``position_ids`` and ``labels``.

    Attributes:
        train: The windows of all stages, one stage after another.
        held_out: The windows for evaluation.
        sizes: Number of windows of each stage.
        description: Number of training documents (``documents``), number of documents that repeat others
            (``repeated``), and the sha256 of the concatenated training documents.
        documents: The training documents, in the column ``document``.
        held_out_documents: The held-out documents, in the same column.
    """

    train: Dataset
    held_out: Dataset
    sizes: list[int]
    description: dict[str, Any]
    documents: Dataset
    held_out_documents: Dataset


def load_data(section: DataSection, tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int | None] = ()) -> Data:
    """Loads the data of a recipe as windows of ``sequence_length`` tokens.

    Args:
        section: The ``data`` section of the recipe.
        tokenizer: The model's tokenizer.
        lengths: Window length of each stage; None for the section's. Default: a single stage.

    Raises:
        ConfigError: The data does not exist, cannot be read, or is too short to train and evaluate on.
    """
    documents = load_documents(section)
    chosen, unseen = split_documents(documents, section)
    present = sum(1 for document in documents["document"] if not _is_blank(document))
    description = {**_describe(chosen), "repeated": present - len(_unique(documents))}
    held_out = make_windows(unseen, section, tokenizer)
    parts = [
        make_windows(chosen, section, tokenizer) if length is None else long_windows(chosen, section, tokenizer, length)
        for length in lengths or (None,)
    ]
    for name, part in (("evaluate", held_out), *(("train", part) for part in parts)):
        if len(part) == 0:
            raise ConfigError(f"data: the text to {name} on has no token with a label: give more text")
    if section.eval_windows is not None:
        held_out = held_out.select(range(min(section.eval_windows, len(held_out))))
    train = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    sizes = [len(part) for part in parts]
    return Data(train.with_format("torch"), held_out.with_format("torch"), sizes, description, chosen, unseen)


def _describe(documents: Dataset) -> dict[str, Any]:
    digest = hashlib.sha256()
    for document in documents["document"]:
        digest.update(document.encode("utf-8", "surrogatepass"))
    return {"documents": len(documents), "sha256": digest.hexdigest()}


def load_documents(section: DataSection) -> Dataset:
    """Returns a data set with one text column, ``document``, which has conversations as JSON.

    Raises:
        ConfigError: The files or the data set cannot be read.
    """
    if section.source == "hub":
        return _from_hub(section)
    if section.source == "offline":
        return _cached(_offline, {}, _digest("offline", sys.version), section)
    paths = _expand(section.files)
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    read = _read_chats if section.kind == "chat" else _read_texts
    arguments = {"paths": [str(path) for path in paths], "documents": section.documents, "column": _column(section)}
    return _cached(read, arguments, _digest(section.kind, section.documents, _column(section), states), section)


def _column(section: DataSection) -> str:
    return section.column or ("messages" if section.kind == "chat" else "text")


def split_documents(documents: Dataset, section: DataSection) -> tuple[Dataset, Dataset]:
    """Splits documents into those to train on and those to evaluate on. A repeated document is used once.

    Raises:
        ConfigError: There are fewer than two different documents.
    """
    order = np.random.default_rng(section.seed).permutation(list(_unique(documents).values()))[: section.max_documents]
    if len(order) < 2:
        raise ConfigError(
            f"data: found {len(order)} different document(s), but needs two, one of them to evaluate on"
            + (" (split a long file into several, or set documents: paragraph)" if section.source == "files" else "")
        )
    count = min(len(order) - 1, max(1, round(section.eval_fraction * len(order))))
    return documents.select(order[count:]), documents.select(order[:count])


def _unique(documents: Dataset) -> dict[bytes, int]:
    """Returns the index of the first occurrence of each text that is not blank, by the text's digest."""
    first: dict[bytes, int] = {}
    for index, document in enumerate(documents["document"]):
        if not _is_blank(document):
            first.setdefault(hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest(), index)
    return first


def _is_blank(document: str | None) -> bool:
    return not document or str(document).isspace()


def make_windows(documents: Dataset, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenizes and packs documents; see :func:`attnswap.training.packing.pack`."""
    encode = _chat_encoder(tokenizer) if section.kind == "chat" else _text_encoder(tokenizer)
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id or 0

    def batch_windows(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        packed = list(
            pack(
                encode(batch["document"]),
                section.sequence_length,
                bos=bos,
                pad=pad,
                cut_documents=section.kind != "chat",
                share_windows=section.pack,
            )
        )
        return {key: [window[key] for window in packed] for key in ("input_ids", "position_ids", "labels")}

    shape = (section.kind, section.sequence_length, section.pack)
    key = _digest(documents._fingerprint, *shape, bos, pad, _tokenizer_key(tokenizer))
    return documents.map(
        batch_windows,
        batched=True,
        remove_columns=documents.column_names,
        new_fingerprint=key,
        features=datasets.Features(
            {name: datasets.List(datasets.Value("int32")) for name in ("input_ids", "position_ids", "labels")}
        ),
        desc="Packing documents",
    )


def long_windows(documents: Dataset, section: DataSection, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Makes windows that are filled by one document each, for training at long context.

    Raises:
        ConfigError: No document is long enough.
    """
    windows = make_windows(documents, replace(section, sequence_length=length, pack=False), tokenizer)
    filled = windows.filter(
        lambda positions, labels: [p[-1] == length - 1 for p in positions],
        batched=True,
        input_columns=["position_ids", "labels"],
        desc="Keeping long documents",
    )
    if len(filled) == 0:
        raise ConfigError(
            f"data: no training document fills a window of {length} tokens; give longer documents, or lower the "
            "sequence_length of the stage"
        )
    return filled


def _text_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], Iterator[Document]]:
    def encode(documents: list[str]) -> Iterator[Document]:
        for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
            yield Document(ids, ids)

    return encode


def _chat_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], Iterator[Document]]:
    def encode(documents: list[str]) -> Iterator[Document]:
        for document in documents:
            yield encode_conversation(json.loads(document), tokenizer)

    return encode


def _from_hub(section: DataSection) -> Dataset:
    column = _column(section)
    try:
        data = datasets.load_dataset(section.name, section.config, split=section.split, cache_dir=section.cache_dir)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f'data: cannot load the data set "{section.name}": {first_line(error)}') from None
    if column not in data.column_names:
        raise ConfigError(
            f'data.column: "{section.name}" has no column "{column}". Columns: {", ".join(data.column_names)}'
        )
    if section.kind == "chat":
        name = f'"{section.name}"'
        return data.map(
            lambda row: {"document": json.dumps(as_conversation(row[column], name))},
            remove_columns=data.column_names,
        )
    if getattr(data.features[column], "dtype", "") not in ("string", "large_string"):
        raise ConfigError(f'data.column: "{column}" of "{section.name}" must contain text, not {data.features[column]}')
    return data.select_columns([column]).rename_column(column, "document")


def _expand(patterns: list[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        found = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if not found:
            raise ConfigError(f'data.files: no file matches "{pattern}"')
        paths += [path for path in found if path not in paths]
    return paths


def _read_texts(paths: list[str], documents: str, column: str) -> Iterator[dict[str, str]]:
    for path in paths:
        for content in read_documents(path, column):
            for piece in [content] if documents == "file" else re.split(r"\n[ \t]*\n+", content):
                yield {"document": piece}


def _read_chats(paths: list[str], documents: str, column: str) -> Iterator[dict[str, str]]:
    for path in paths:
        refuse_container(path, allowed=(".json",))
        for where, line in read_lines(path):
            yield {"document": json.dumps(as_conversation(parse_line(line, where), where, column))}


def _offline() -> Iterator[dict[str, str]]:
    for document in text.training_documents():
        yield {"document": document}


def _cached(
    generator: Callable[..., Iterator[dict[str, str]]], arguments: dict[str, Any], key: str, section: DataSection
) -> Dataset:
    try:
        return Dataset.from_generator(
            generator,
            gen_kwargs=arguments,
            features=datasets.Features({"document": datasets.Value("large_string")}),
            cache_dir=section.cache_dir,
            fingerprint=key,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:16]


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a hash of a tokenizer's definition; ``datasets`` would pickle it, which is not deterministic."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer)} {content} {tokenizer.chat_template}".encode()).hexdigest()
