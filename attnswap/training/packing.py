"""Pack documents into windows of one length without letting them see each other.

Position ids restart at every document, and no attention mask is passed: that is how transformers recognises packed
documents and keeps them apart, provided no KV cache is in play. Nothing is predicted across a border, because the
first token of each document carries no label.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

IGNORED = -100


@dataclass(frozen=True)
class Document:
    """Tokens and, for each, the label: the token itself, or -100 where nothing is learned."""

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
        """Returns the window, its free end filled by a document of padding that is not learned."""
        free = length - len(self.input_ids)
        if free:
            self.add([pad] * free, [IGNORED] * free)
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "labels": self.labels}


def pack(
    documents: Iterable[Document], length: int, *, bos: int | None, pad: int, whole: bool = False
) -> Iterator[dict[str, list[int]]]:
    """Yields windows of exactly ``length`` tokens.

    A document that does not fit is cut; every piece is then a document of its own, with its own BOS.

    Args:
        documents: What to pack, in this order.
        length: Tokens in a window, at least 2.
        bos: Put before every document or piece that does not start with it; None: nothing.
        pad: Fills the end of a window where nothing fits.
        whole: Never cut a document to fill a window: it starts in a new one, and what exceeds that one is dropped.

    Yields:
        ``input_ids``, ``position_ids`` and ``labels``, each of ``length`` numbers; never a window without a label.
    """
    window = _Window()
    for document in documents:
        ids, labels = document.ids, document.labels
        if bos is not None and ids[:1] != [bos]:
            ids, labels = [bos, *ids], [IGNORED, *labels]
        if whole:
            ids, labels = ids[:length], labels[:length]
        while len(ids) > 1 and any(label != IGNORED for label in labels[1:]):
            room = length - len(window.input_ids)
            if room < (len(ids) if whole else 2):
                yield window.closed(length, pad)
                window, room = _Window(), length
            window.add(ids[:room], labels[:room])
            head = [] if bos is None else [bos]
            ids, labels = head + ids[room:], [IGNORED] * len(head) + labels[room:]
    if window.input_ids:
        yield window.closed(length, pad)
