"""Which tokens each window contains, and which of them it scores.

The default protocol, for a context length L: a window spans L tokens of text and scores its last half, so windows
advance by L / 2. The last token is only a target, not an input, which leaves room for BOS: the model reads BOS and
L - 1 tokens, never more than L positions. Scoring begins at half the largest context. So every length scores the same
tokens, each once and with at least half a window of text before it.

With an integer stride S it is the rolling window of lm-eval: the prefix token and the first L - 1 tokens predict the
first L tokens, then each window reads L tokens of text, without a prefix, and scores the next min(S, L). For S >= L
this is lm-eval's own ``loglikelihood_rolling``, whose windows are disjoint except for the last one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from attnswap.errors import ConfigError
from attnswap.evaluation.corpus import Corpus


@dataclass(frozen=True)
class Window:
    """Text tokens ``begin`` to ``end - 1``, of which ``first`` to ``end - 1`` are scored. The last token is no input.

    Attributes:
        prefix: Whether the prefix token (BOS) stands before the text.
    """

    begin: int
    first: int
    end: int
    prefix: bool

    @property
    def scored(self) -> int:
        """Number of tokens that the window scores."""
        return self.end - self.first

    @property
    def fed(self) -> int:
        """Number of positions that the model reads, the prefix included."""
        return self.end - 1 - self.begin + self.prefix

    def inputs(self, ids: torch.Tensor, prefix_id: int | None) -> torch.Tensor:
        """Returns the token ids that the model reads, int64 (fed,). The last ``scored`` of them predict the targets."""
        text = ids[self.begin : self.end - 1]
        return torch.cat([torch.tensor([prefix_id]), text]) if self.prefix else text


@dataclass(frozen=True)
class Protocol:
    """How an evaluation scored its tokens; two are comparable only if these agree.

    Attributes:
        name: ``"half-window"`` or ``"lm-eval"``.
        contexts: Context lengths in tokens, ascending.
        stride: The stride given, or None for half of each window.
        prefix_id: Id of the token before a window's text (BOS; lm-eval: BOS, else EOS), or None if there is none.
        first_token: Index of the first scored token in the text.
        scored_tokens: How many consecutive tokens are scored.
        scored_bytes: Bytes of the text of these tokens.
        tokens_sha256: Hash of the text's ids (int64, little endian) up to the last scored one: targets and contexts.
    """

    name: str
    contexts: tuple[int, ...]
    stride: int | None
    prefix_id: int | None
    first_token: int
    scored_tokens: int
    scored_bytes: int
    tokens_sha256: str

    @property
    def end(self) -> int:
        """Index after the last scored token."""
        return self.first_token + self.scored_tokens

    def windows(self, context: int) -> list[Window]:
        """Returns the windows of one context length, in order, and asserts that they score each token once."""
        windows = self._half_windows(context) if self.stride is None else self._rolling_windows(context, self.stride)
        scored = [i for window in windows for i in range(window.first, window.end)]
        if scored != list(range(self.first_token, self.end)) or any(window.fed > context for window in windows):
            raise AssertionError(f"windows of {context} do not score each token once within the context")
        return windows

    def position_windows(self) -> list[Window]:
        """Returns disjoint full windows of the largest context, each scored from its start, for the position curve."""
        size, prefix = self.contexts[-1], self.prefix_id is not None
        begins = range(0, max(self.end - size, 0) + 1, size)
        return [Window(begin, begin if prefix else begin + 1, begin + size, prefix) for begin in begins]

    def to_dict(self) -> dict[str, Any]:
        """Returns the protocol entry of a report."""
        return {
            **asdict(self),
            "contexts": list(self.contexts),
            "coverage": 1.0,
            "log_softmax": "fp32",
            "accum": "fp64",
        }

    def _half_windows(self, context: int) -> list[Window]:
        stride = context // 2
        firsts = range(self.first_token, self.end, stride)
        prefix = self.prefix_id is not None
        return [Window(first - (context - stride), first, min(first + stride, self.end), prefix) for first in firsts]

    def _rolling_windows(self, context: int, stride: int) -> list[Window]:
        windows = [Window(0, 0, min(context, self.end), prefix=True)]
        while (scored := windows[-1].end) < self.end:
            end = min(scored + min(stride, context), self.end)
            windows.append(Window(end - context - 1, scored, end, prefix=False))
        return windows


def plan(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[int],
    stride: int | None = None,
    max_tokens: int | None = None,
) -> Protocol:
    """Decides which tokens are scored, and how.

    Args:
        corpus: The text.
        tokenizer: The tokenizer, for the prefix token.
        contexts: Context lengths in tokens, at least 2 each.
        stride: None for the half-window protocol, an integer for lm-eval's.
        max_tokens: Upper limit of the scored tokens; default: no limit.

    Raises:
        ConfigError: A length is out of range, the text is shorter than the largest context, or lm-eval's protocol
            is used with a tokenizer that has neither BOS nor EOS.
    """
    if not contexts or min(contexts) < 2:
        raise ConfigError(f"contexts must be lengths of at least 2 tokens, got {list(contexts)}")
    if stride is not None and stride < 1:
        raise ConfigError(f"stride must be at least 1, got {stride}; leave it out for half of each window")
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens must be at least 2, got {max_tokens}")
    lengths = tuple(sorted(set(contexts)))
    largest, tokens = lengths[-1], len(corpus.ids)
    if tokens < largest:
        raise ConfigError(
            f'the text "{corpus.id}" has {tokens} tokens but the largest context needs at least {largest}: '
            "give a longer text or smaller contexts"
        )
    prefix_id = tokenizer.bos_token_id
    first = largest - largest // 2 if stride is None else 0
    scored = min(tokens - first, max_tokens or tokens)
    if stride is not None:
        prefix_id = tokenizer.eos_token_id if prefix_id is None else prefix_id
        if prefix_id is None:
            raise ConfigError(
                "lm-eval's protocol needs a BOS or EOS token, and this tokenizer has neither: leave out the stride"
            )
        if scored < largest:
            raise ConfigError(
                f"lm-eval's windows of {largest} tokens need at least as many scored tokens, but max_tokens is {scored}"
            )
    end = first + scored
    scored_bytes = corpus.bytes_between(first, end)
    if not scored_bytes:
        raise ConfigError(f"the {scored} scored tokens are parts of one character: score more tokens")
    return Protocol(
        name="half-window" if stride is None else "lm-eval",
        contexts=lengths,
        stride=stride,
        prefix_id=prefix_id,
        first_token=first,
        scored_tokens=scored,
        scored_bytes=scored_bytes,
        tokens_sha256=hashlib.sha256(corpus.ids[:end].numpy().astype("<i8").tobytes()).hexdigest(),
    )
