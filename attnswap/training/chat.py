"""Tokenize conversations, with labels for the assistant's tokens only."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase

from attnswap.errors import ConfigError
from attnswap.training.packing import IGNORED, Document

Message = dict[str, Any]


def as_conversation(value: Any, where: str, key: str = "messages") -> list[Message]:
    """Returns the messages of a row: a list of ``{"role": ..., "content": ...}``, or a mapping with such a list.

    Args:
        value: The row.
        where: Location of the row, for error messages.
        key: The key of the list in a mapping.

    Raises:
        ConfigError: The row is not a conversation in this format.
    """
    messages = value.get(key) if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{where}: needs a list "{key}" with at least one message')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ConfigError(f'{where}: each message needs a text "role" and a text "content"')
    return messages


def encode_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> Document:
    """Tokenizes a conversation by the tokenizer's chat template and labels the assistant's tokens.

    A template with ``{% generation %}`` markers says which tokens these are. With other templates, an assistant's turn
    is the text between the rendering of the earlier messages, generation prompt included, and the rendering up to this
    message. The end-of-turn token belongs to the turn, the white space after it does not.

    Args:
        messages: Dicts with ``role`` and ``content``.
        tokenizer: A fast tokenizer with a chat template.

    Returns:
        The tokens and labels.

    Raises:
        ConfigError: The tokenizer has no template or is not fast, or the template renders earlier messages differently
            when others follow, so that the assistant's turns cannot be found.
    """
    messages = list(messages)
    template = tokenizer.chat_template
    if not template:
        raise ConfigError("the tokenizer has no chat template: set model.tokenizer to one that has, or use kind: text")
    if not tokenizer.is_fast:
        raise ConfigError("chat data needs a fast tokenizer, which knows the offsets of tokens: set model.tokenizer")
    if "{% generation" in str(template) or "{%- generation" in str(template):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert isinstance(encoded, BatchEncoding)
        ids, labelled = list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
    else:
        text = _render(messages, tokenizer)
        spans = _assistant_spans(messages, text, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        labelled = [
            any(start < end and low <= start < high for low, high in spans) for start, end in encoded["offset_mapping"]
        ]
    return Document(ids, [token if keep else IGNORED for token, keep in zip(ids, labelled, strict=True)])


def _render(messages: list[Message], tokenizer: PreTrainedTokenizerBase, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def _assistant_spans(messages: list[Message], text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if i == 0:
            raise ConfigError("a conversation cannot start with an assistant message: put a user message before it")
        before = _render(messages[:i], tokenizer, prompt=True)
        after = _render(messages[: i + 1], tokenizer)
        if not (text.startswith(before) and text.startswith(after)):
            raise ConfigError(
                "the chat template renders earlier messages differently when others follow, so that the assistant's "
                "tokens cannot be found: use a template with {% generation %} markers, or single-turn data"
            )
        spans.append((len(before), len(after.rstrip())))
    return spans
