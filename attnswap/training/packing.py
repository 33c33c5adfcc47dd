"""Pack documents into windows of one length, in which no document sees another.

Position ids restart at every document, and no attention mask is passed. From this transformers recognises packed
documents and masks them from each other, provided there is no KV cache. The first token of each document has no label,
so that it is not predicted from the document before.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from attnswap.errors import UnsupportedModelError
from attnswap.modes import evaluating

IGNORED = -100
"""The label of a position that has no loss."""


@dataclass(frozen=True)
class Document:
    """Tokens and their labels: the token itself, or -100 for no label."""

    ids: list[int]
    labels: list[int]


@dataclass
class _Window:
    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, ids: list[int], labels: list[int]) -> None:
        self.input_ids += ids
        self.position_ids += range(len(ids))
        self.labels += [IGNORED, *labels[1:]]

    def closed(self, length: int, pad: int) -> dict[str, list[int]]:
        """Returns the window, with a document of padding without labels at its end."""
        free = length - len(self.input_ids)
        if free:
            self.add([pad] * free, [IGNORED] * free)
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "labels": self.labels}


def pack(
    documents: Iterable[Document],
    length: int,
    *,
    bos: int | None,
    pad: int,
    cut_documents: bool = True,
    share_windows: bool = True,
) -> Iterator[dict[str, list[int]]]:
    """Yields windows of exactly ``length`` tokens.

    A document that does not fit is cut. Each piece is then a document of its own, with its own BOS.

    Args:
        documents: The documents, in this order.
        length: Tokens per window, at least 2.
        bos: Token before every document or piece that does not start with it; None: no such token.
        pad: Token that fills the end of a window if nothing else fits.
        cut_documents: Whether a document may be cut to fill a window. If not, a document that does not fit starts a new
            window, and is truncated to one window.
        share_windows: Whether a window may contain several documents or pieces.

    Yields:
        ``input_ids``, ``position_ids`` and ``labels``, each of ``length`` numbers. Every window has a label.
    """
    window = _Window()
    for document in documents:
        ids, labels = document.ids, document.labels
        if bos is not None and ids[:1] != [bos]:
            ids, labels = [bos, *ids], [IGNORED, *labels]
        if not cut_documents:
            ids, labels = ids[:length], labels[:length]
        while len(ids) > 1 and any(label != IGNORED for label in labels[1:]):
            room = length - len(window.input_ids)
            if room < (2 if cut_documents else len(ids)) or (window.input_ids and not share_windows):
                yield window.closed(length, pad)
                window, room = _Window(), length
            window.add(ids[:room], labels[:room])
            head = [] if bos is None else [bos]
            ids, labels = head + ids[room:], [IGNORED] * len(head) + labels[room:]
    if window.input_ids:
        yield window.closed(length, pad)


def check_separation(model: PreTrainedModel) -> None:
    """Checks that no document in a packed window sees another.

    Some architectures of transformers ignore position ids when they make their masks.

    Args:
        model: The model that will be trained, on any device.

    Raises:
        UnsupportedModelError: A document sees another one in the same window.
    """
    device = next(model.parameters()).device
    ids = torch.arange(3, 19, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(8, device=device).repeat(2)[None]
    with evaluating(model), torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:]
        alone = model(input_ids=ids[:, 8:], use_cache=False).logits
    if (packed - alone).abs().max() > 0.05 * alone.float().std():
        raise UnsupportedModelError(
            f"{type(model).__name__} ignores position ids in its mask, so that packed documents would see each other: "
            "set data.pack: false, which gives each document its own windows"
        )
