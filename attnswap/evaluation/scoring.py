"""Negative log-likelihoods of tokens, without the logits of a whole window.

The model runs once per window with its head applied to a single position; a hook keeps the hidden states. Then the
head runs on those hidden states, a chunk of positions at a time (see :mod:`attnswap.evaluation.lm_head`). That the
chunks equal the full logits is checked on a few tokens before anything is scored.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from attnswap.errors import ConfigError, UnsupportedModelError, non_finite
from attnswap.evaluation.lm_head import head_logits, with_hidden
from attnswap.evaluation.windows import Window
from attnswap.modes import evaluating
from attnswap.surgery.body import base_of, body_of
from attnswap.surgery.stacks import SENSES

CHUNK_ELEMENTS = 1 << 24
"""Logits in memory at once: 64 MiB in fp32."""


class Scorer:
    """Scores windows of text with a causal language model.

    Args:
        model: The model, patched or not, with or without a PEFT wrapper.
        chunk_elements: Upper limit of the logits in memory at once; at least one position is always computed.

    Raises:
        UnsupportedModelError: The model is not a decoder with a head on its last hidden states, or is a PEFT model with
            a learned prompt.
    """

    def __init__(self, model: nn.Module, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                "a PEFT model with a learned prompt or prefix cannot be measured, since windows are scored without the "
                "prompt: measure the base model, or an adapter of another kind"
            )
        unwrapped = base_of(model)
        self.body = body_of(unwrapped)
        self.model: PreTrainedModel = unwrapped
        self.vocabulary = int(unwrapped.config.get_text_config().vocab_size)
        self.chunk_elements = chunk_elements

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return next(self.model.get_input_embeddings().parameters()).device

    @contextmanager
    def eval_no_grad(self) -> Iterator[None]:
        """Evaluation mode without gradients; the training mode of every module is restored afterwards.

        Not inference mode: buffers that a forward updates (dynamic RoPE) must stay usable for training.
        """
        with evaluating(self.model), torch.no_grad():
            yield

    def logit_chunks(self, inputs: torch.Tensor, last: int, size: int | None = None) -> Iterator[torch.Tensor]:
        """Yields the logits of the last positions of some inputs, a chunk of positions at a time.

        Args:
            inputs: Token ids, shape (batch, tokens).
            last: How many positions, counted from the end.
            size: Positions in a chunk; default: as many as ``chunk_elements`` allows.

        Yields:
            fp32, shape (batch, positions, vocabulary).
        """
        outputs: list[ModelOutput] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
            if not isinstance(output, ModelOutput) or output.get("last_hidden_state") is None:
                raise UnsupportedModelError(f"the decoder of {type(self.model).__name__} returns no last_hidden_state")
            outputs.append(output)
            return with_hidden(output, output["last_hidden_state"][:, -1:])

        handle = self.body.register_forward_hook(keep)
        try:
            self.model(input_ids=inputs, use_cache=False)
        finally:
            handle.remove()
        (output,) = outputs
        size = size or max(1, self.chunk_elements // (self.vocabulary * len(inputs)))
        for hidden in output["last_hidden_state"][:, -last:].split(size, dim=1):
            yield head_logits(self.model, output, hidden, forward=self.model).float()

    def chunk_bytes(self, rows: int) -> int:
        """Returns the memory in bytes of a chunk of at most ``rows`` positions: logits, fp32 copy and log-softmax."""
        elements = min(self.vocabulary * rows, max(self.vocabulary, self.chunk_elements))
        return elements * (self.model.dtype.itemsize + 4 + 4)

    def nll(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the negative log-likelihoods of targets, which the last positions of the inputs predict.

        Args:
            inputs: Token ids, shape (batch, tokens).
            targets: Token ids, shape (batch, scored).

        Returns:
            Nats, fp32, shape (batch, scored), on the CPU.
        """
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        scores, done = [], 0
        for logits in self.logit_chunks(inputs, targets.shape[1]):
            chunk = targets[:, done : done + logits.shape[1]].to(logits.device)
            done += logits.shape[1]
            scores.append(F.cross_entropy(logits.flatten(0, 1), chunk.flatten(), reduction="none").view_as(chunk))
        return torch.cat(scores, dim=1).cpu()

    def score(self, ids: torch.Tensor, windows: Sequence[Window], prefix_id: int | None) -> torch.Tensor:
        """Returns the negative log-likelihoods of windows that all have the same shape, fp32 (windows, scored).

        Raises:
            NumericsError: A value is not finite; the message names the window.
        """
        inputs = torch.stack([window.inputs(ids, prefix_id) for window in windows])
        targets = torch.stack([ids[window.first : window.end] for window in windows])
        nll = self.nll(inputs, targets)
        for window, finite in zip(windows, nll.isfinite().all(dim=1).tolist(), strict=True):
            if not finite:
                raise non_finite(
                    f"non-finite NLL in the window of tokens {window.begin} to {window.end - 1}, context {window.fed}"
                )
        return nll

    def check_positions(self, longest: int) -> None:
        """Raises ConfigError if a learned position embedding has fewer positions than ``longest``."""
        for name, module in self.model.named_modules():
            table = isinstance(module, nn.Embedding) and ("pos" in name or name.endswith("wpe"))
            if table and module.num_embeddings < longest and not SENSES.search(name):
                raise ConfigError(
                    f"the model has {module.num_embeddings} learned positions ({name}) and cannot read windows of "
                    f"{longest} tokens: leave out longer contexts"
                )

    def check_scorable(self, ids: torch.Tensor, contexts: Sequence[int]) -> None:
        """Checks that windows fit, and on a few tokens that the model is causal and that chunks give its logits.

        Args:
            ids: Token ids of the text.
            contexts: Context lengths in tokens.

        Raises:
            ConfigError: A learned position embedding has fewer positions than the largest context.
            UnsupportedModelError: The chunks differ from the full logits, or logits depend on later tokens.
        """
        self.check_positions(max(contexts))
        inputs = ids[None, : min(16, max(contexts))].to(self.device, copy=True)
        full = self.model(input_ids=inputs, use_cache=False).logits.float()
        chunked = torch.cat(
            [part.to(full.device) for part in self.logit_chunks(inputs, inputs.shape[1], size=3)], dim=1
        )
        # The rounding of a matrix product depends on its shape: a few units in the last place of the head's dtype.
        tolerance = max(1e-4, 4 * torch.finfo(self.model.dtype).eps) * full.abs().max().item()
        if not full.isfinite().all():
            return  # scoring names the window in its error
        if not torch.allclose(chunked, full, rtol=0, atol=tolerance):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} computes its logits from more than its last hidden states, so that they "
                "cannot be computed in chunks: perplexity cannot be measured for this architecture"
            )
        inputs[:, -1] = (inputs[:, -1] + 1) % self.vocabulary
        other = self.model(input_ids=inputs, use_cache=False).logits.float()
        if not torch.allclose(other[:, :-1], full[:, :-1], rtol=0, atol=tolerance):
            raise UnsupportedModelError(
                f"the logits of {type(self.model).__name__} depend on later tokens, so it is not a causal language "
                "model: load an encoder with is_decoder=True"
            )
