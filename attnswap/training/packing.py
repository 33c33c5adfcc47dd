"""Pack documents into windows of one length without letting them see each other.

Position ids restart at every document, and no attention mask is passed: that is how transformers recognises packed
documents and keeps them apart, provided no KV cache is in play. Nothing is predicted across a border, because the
first token of each document carries no label.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from attnswap.errors import UnsupportedModelError
from attnswap.modes import evaluating

IGNORED = -100
"""The label of a position that is not learned."""


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
    documents: Iterable[Document],
    length: int,
    *,
    bos: int | None,
    pad: int,
    whole: bool = False,
    together: bool = True,
) -> Iterator[dict[str, list[int]]]:
    """Yields windows of exactly ``length`` tokens.

    A document that does not fit is cut; every piece is then a document of its own, with its own BOS.

    Args:
        documents: What to pack, in this order.
        length: Tokens in a window, at least 2.
        bos: Put before every document or piece that does not start with it; None: nothing.
        pad: Fills the end of a window where nothing fits.
        whole: Never cut a document to fill a window: it starts in a new one, and what exceeds that one is dropped.
        together: Put several documents into a window; if not, each piece has one for itself.

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
            if room < (len(ids) if whole else 2) or (window.input_ids and not together):
                yield window.closed(length, pad)
                window, room = _Window(), length
            window.add(ids[:room], labels[:room])
            head = [] if bos is None else [bos]
            ids, labels = head + ids[room:], [IGNORED] * len(head) + labels[room:]
    if window.input_ids:
        yield window.closed(length, pad)


def check_separation(model: PreTrainedModel) -> None:
    """Makes sure that a model keeps packed documents apart.

    Not every architecture does: some of transformers' models do not look at position ids when they make their masks.

    Args:
        model: The model that will be trained, on any device.

    Raises:
        UnsupportedModelError: What a token sees reaches across the border of its document.
    """
    device = next(model.parameters()).device
    ids = torch.arange(3, 19, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(8, device=device).repeat(2)[None]
    with evaluating(model), torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 8:]
        alone = model(input_ids=ids[:, 8:], use_cache=False).logits
    if (packed - alone).abs().max() > 0.05 * alone.float().std():
        raise UnsupportedModelError(
            f"{type(model).__name__} lets packed documents see each other (its mask ignores position ids); set "
            "data.pack: false, which gives each document windows of its own"
        )
