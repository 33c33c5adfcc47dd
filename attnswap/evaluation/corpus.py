"""The evaluation text: its token ids, and the bytes of text that each token covers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from attnswap import text as offline
from attnswap.errors import ConfigError, first_line
from attnswap.files import read_documents

WINDOWS = 4
"""Default number of windows for measurements that use :func:`sample_windows`."""


@dataclass(frozen=True)
class Corpus:
    """A tokenised text.

    Attributes:
        id: Name in reports.
        text: The text; documents are joined by a blank line.
        ids: Token ids, int64 (tokens,), without special tokens.
        byte_ends: Bytes (UTF-8) of the text up to the end of each token, int64 (tokens,), never decreasing.
        tokenizer_sha256: Hash of the tokenizer's full definition.
    """

    id: str
    text: str
    ids: torch.Tensor
    byte_ends: np.ndarray
    tokenizer_sha256: str

    def bytes_between(self, first: int, end: int) -> int:
        """Returns how many bytes of the text the tokens ``first`` to ``end - 1`` cover."""
        before = int(self.byte_ends[first - 1]) if first else 0
        return int(self.byte_ends[end - 1]) - before

    def describe(self) -> dict[str, Any]:
        """Returns the corpus entry of a report."""
        raw = _encode(self.text)
        return {
            "id": self.id,
            "license": "PSF-2.0" if self.id == offline.EVALUATION else None,
            "sha256": hashlib.sha256(raw).hexdigest(),
            "bytes": len(raw),
            "tokens": len(self.ids),
            "tokenizer_sha256": self.tokenizer_sha256,
        }


def load_corpus(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str] | None = None, name: str | None = None
) -> Corpus:
    """Tokenises a text.

    Args:
        tokenizer: The model's tokenizer. A fast tokenizer gives the bytes of each token by its offsets into the text.
            With a slow one, the decoded tokens must add up to the text.
        text: One text, documents (joined by a blank line), or None for the offline evaluation text.
        name: Name in reports.

    Raises:
        ConfigError: The text is empty, or a slow tokenizer does not reproduce it.
    """
    if text is None:
        text, name = offline.evaluation_text(), name or offline.EVALUATION
    elif not isinstance(text, str):
        text = "\n\n".join(text)
    if tokenizer.is_fast:
        encoded = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )
        ids = encoded["input_ids"]
        ends = [end for _, end in encoded["offset_mapping"]]
    else:
        ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        ends = _ends_by_decoding(tokenizer, ids, text)
    if not ids:
        raise ConfigError("the evaluation text is empty: it has no tokens")
    # The bytes of a character that is split over several tokens count for the first of them, and those of text that the
    # tokenizer skipped for the next token. So the bytes of all tokens add up to those of the text.
    bytes_before = np.concatenate([[0], np.cumsum(_utf8_lengths(text))])
    byte_ends = bytes_before[np.maximum.accumulate(np.asarray(ends))]
    return Corpus(name or "text", text, torch.tensor(ids), byte_ends, _tokenizer_sha256(tokenizer))


def sample_windows(
    tokenizer: PreTrainedTokenizerBase, text: str | Sequence[str] | None, length: int, count: int
) -> list[torch.Tensor]:
    """Cuts windows out of a text, at regular distances.

    Args:
        tokenizer: The model's tokenizer.
        text: See :func:`load_corpus`.
        length: Tokens in a window, BOS included.
        count: Maximum number of windows.

    Returns:
        Token ids, each of shape (1, length).

    Raises:
        ConfigError: The text is shorter than a window.
    """
    ids, bos = load_corpus(tokenizer, text).ids, tokenizer.bos_token_id
    own = length - (bos is not None)
    count = min(count, len(ids) // own)
    if not count:
        raise ConfigError(f"the text has {len(ids)} tokens, too few for a window of {length}")
    head = ids.new_tensor([] if bos is None else [bos])
    starts = (index * (len(ids) - own) // max(1, count - 1) for index in range(count))
    return [torch.cat([head, ids[start : start + own]])[None] for start in starts]


def read_text(path: str | Path) -> str:
    """Reads a text file, or the texts of a file of JSON lines, joined by blank lines.

    Raises:
        ConfigError: See :func:`attnswap.files.read_documents`.
    """
    return "\n\n".join(read_documents(path))


def read_dataset(reference: str) -> list[str]:
    """Reads the documents of a hub or local data set.

    Args:
        reference: ``NAME[:CONFIG[:SPLIT]]``. The default split is the first of test, validation and train that exists.
            The text is in the column ``text``, else in the only column of strings.

    Raises:
        ConfigError: The data set, configuration, split or column does not exist.
    """
    from datasets import get_dataset_split_names, load_dataset

    name, config, split, *_ = (*reference.split(":"), "", "")
    try:
        names = get_dataset_split_names(name, config or None)
        chosen = split or next((s for s in ("test", "validation", "train") if s in names), names[0])
        data = load_dataset(name, config or None, split=chosen)
    except Exception as error:  # datasets raises a dozen unrelated types
        raise ConfigError(
            f'cannot load the data set "{reference}" (NAME[:CONFIG[:SPLIT]]): {first_line(error)}'
        ) from error
    columns = [
        key for key, feature in data.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    column = "text" if "text" in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        raise ConfigError(
            f'the data set "{reference}" has no column "text", and not just one column of strings: {columns}'
        )
    return [row for row in data[column] if row]


def _ends_by_decoding(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> list[int]:
    """Returns where in the text each token ends, by decoding every token."""
    pieces = [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids]
    if "".join(pieces) != text:
        raise ConfigError(
            "bits per byte need the text that each token covers, and the decoded tokens of this slow tokenizer do not "
            "add up to the text: use a fast tokenizer"
        )
    return np.cumsum([len(piece) for piece in pieces]).tolist()


def _encode(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _utf8_lengths(text: str) -> np.ndarray:
    """Returns the number of UTF-8 bytes of each character, int64 (characters,)."""
    points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    return 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)


def _tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        definition = tokenizer.backend_tokenizer.to_str()
    else:
        definition = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(definition.encode()).hexdigest()
