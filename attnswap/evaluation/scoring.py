"""Negative log-likelihoods of tokens, without the logits of a whole window.

The model runs once per window with its head applied to a single position; a hook keeps the hidden states. Then the
model's own forward is replayed with its base answering from those hidden states, a chunk of rows at a time, so that
whatever a model does after its base (soft caps, logit scales) is done by its own code. That the replay equals the
full logits is checked on a few tokens before anything is scored.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from attnswap.errors import ConfigError, UnsupportedModelError, non_finite
from attnswap.evaluation.windows import Window
from attnswap.modes import evaluating
from attnswap.surgery.body import base_of, body_of
from attnswap.surgery.stacks import SENSES

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in fp32."""


class Scorer:
    """Scores windows of text with a causal language model.

    Args:
        model: The model, patched or not; a PEFT wrapper is looked through.
        chunk_elements: Upper limit of logits held at once; at least one row is always computed.

    Raises:
        UnsupportedModelError: The model is not a base with a head on its last hidden state, or a peft model learned a
            prompt, which its base would be scored without.
    """

    def __init__(self, model: nn.Module, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                "a peft model with a learned prompt or prefix is not measured: its windows would be scored without it"
            )
        unwrapped = base_of(model)
        self.body = body_of(unwrapped)
        self.model: PreTrainedModel = unwrapped
        self.vocabulary = int(unwrapped.config.get_text_config().vocab_size)
        self.chunk_elements = chunk_elements

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next(self.model.get_input_embeddings().parameters()).device

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Evaluation mode without gradients; the training mode of every module is restored afterwards.

        Not inference mode: buffers a model updates in its forward (dynamic RoPE) must stay usable for training.
        """
        with evaluating(self.model), torch.no_grad():
            yield

    def rows(self, inputs: torch.Tensor, last: int, size: int | None = None) -> Iterator[torch.Tensor]:
        """Yields fp32 logits (batch, rows, vocabulary) of the last ``last`` positions of inputs (batch, fed).

        ``size`` is the number of rows at a time; default: what ``chunk_elements`` allows.
        """
        outputs: list[Any] = []

        def keep(_module: nn.Module, _args: Any, output: Any) -> Any:
            if getattr(output, "last_hidden_state", None) is None:
                raise UnsupportedModelError(f"the base of {type(self.model).__name__} returns no last_hidden_state")
            outputs.append(output)
            return _with_hidden(output, output.last_hidden_state[:, -1:])

        handle = self.body.register_forward_hook(keep)
        try:
            self.model(input_ids=inputs, use_cache=False)
        finally:
            handle.remove()
        (output,) = outputs
        size = size or max(1, self.chunk_elements // (self.vocabulary * len(inputs)))
        for hidden in output.last_hidden_state[:, -last:].split(size, dim=1):
            with _answering(self.body, _with_hidden(output, hidden)):
                yield self.model(input_ids=inputs[:, : hidden.shape[1]], use_cache=False).logits.float()

    def chunk_bytes(self, rows: int) -> int:
        """Returns the memory a chunk of at most ``rows`` rows takes: logits, their fp32 copy and log-softmax."""
        elements = min(self.vocabulary * rows, max(self.vocabulary, self.chunk_elements))
        return elements * (self.model.dtype.itemsize + 4 + 4)

    def nll(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns fp32 NLLs in nats (batch, scored), on the CPU, of targets (batch, scored) after inputs (batch, fed).

        The last ``scored`` positions of the inputs predict the targets.
        """
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        scores, done = [], 0
        for logits in self.rows(inputs, targets.shape[1]):
            chunk = targets[:, done : done + logits.shape[1]].to(logits.device)
            done += logits.shape[1]
            scores.append(F.cross_entropy(logits.flatten(0, 1), chunk.flatten(), reduction="none").view_as(chunk))
        return torch.cat(scores, dim=1).cpu()

    def score(self, ids: torch.Tensor, windows: Sequence[Window], prefix_id: int | None) -> torch.Tensor:
        """Returns fp32 NLLs (windows, scored) of windows of one shape.

        Raises:
            NumericsError: An NLL is not finite; names the window.
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
        """Raises ConfigError if a learned position table is shorter than a window of ``longest`` tokens."""
        for name, module in self.model.named_modules():
            table = isinstance(module, nn.Embedding) and ("pos" in name or name.endswith("wpe"))
            if table and module.num_embeddings < longest and not SENSES.search(name):
                raise ConfigError(
                    f"the model has {module.num_embeddings} learned positions ({name}) and cannot read windows of "
                    f"{longest} tokens: leave out contexts beyond that"
                )

    def check(self, ids: torch.Tensor, contexts: Sequence[int]) -> None:
        """Proves on a few tokens that the model is causal and chunks of rows give its logits, and that windows fit.

        Raises:
            ConfigError: A learned position table is shorter than the largest context.
            UnsupportedModelError: The chunks differ, or logits depend on later tokens.
        """
        self.check_positions(max(contexts))
        inputs = ids[None, : min(16, max(contexts))].to(self.device, copy=True)
        full = self.model(input_ids=inputs, use_cache=False).logits.float()
        chunked = torch.cat([part.to(full.device) for part in self.rows(inputs, inputs.shape[1], size=3)], dim=1)
        # The same rows in smaller matrix products: a few units in the last place of the head's dtype.
        tolerance = max(1e-4, 4 * torch.finfo(self.model.dtype).eps) * full.abs().max().item()
        if not full.isfinite().all():
            return  # the windows will say so
        if not torch.allclose(chunked, full, rtol=0, atol=tolerance):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} computes its logits from more than its last hidden state, "
                "so they cannot be scored in chunks"
            )
        inputs[:, -1] = (inputs[:, -1] + 1) % self.vocabulary
        other = self.model(input_ids=inputs, use_cache=False).logits.float()
        if not torch.allclose(other[:, :-1], full[:, :-1], rtol=0, atol=tolerance):
            raise UnsupportedModelError(
                f"the logits of {type(self.model).__name__} depend on tokens that come later, so it is no causal "
                "language model (an encoder that was loaded without is_decoder=True?)"
            )


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """A copy of a base's output with other hidden states."""
    output = copy.copy(output)
    output.last_hidden_state = hidden
    return output


@contextmanager
def _answering(base: nn.Module, output: Any) -> Iterator[None]:
    """Lets a module answer with a given output instead of computing one; hooks on it still run."""
    previous = base.__dict__.get("forward")
    base.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if previous is None:
            del base.__dict__["forward"]
        else:
            base.__dict__["forward"] = previous
