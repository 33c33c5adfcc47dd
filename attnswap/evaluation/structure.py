"""Statistics of attention weights (sinks, sparsity, entropy, dead heads) and of massive activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from attnswap.errors import ConfigError, UnsupportedModelError, non_finite
from attnswap.evaluation.corpus import WINDOWS, sample_windows
from attnswap.evaluation.scoring import Scorer
from attnswap.surgery.body import base_of
from attnswap.surgery.entry import is_patched
from attnswap.surgery.patched import stacks_of
from attnswap.surgery.spec import KEY

SINK = 0.3
"""A head is a sink if the mean weight that its queries give to the first token is above this."""
FIRST_QUERY = 64
"""Index of the first query that counts: earlier queries see too few keys to characterise a head."""
DEAD = 1e-6
"""A query whose weights sum to less attends to nothing."""


@dataclass(frozen=True)
class Reach:
    """Which earlier keys the queries of a layer see; all of them if there is neither a window nor a chunk.

    Attributes:
        window: Sliding window: number of keys that a query sees at most, its own included.
        chunk: Chunked attention: size of the chunks, within which queries see keys.
    """

    window: int | None = None
    chunk: int | None = None

    def first_keys(self, positions: Tensor) -> Tensor:
        """Returns the index of the first key that the queries at these positions see."""
        if self.chunk is not None:
            return positions // self.chunk * self.chunk
        return torch.zeros_like(positions) if self.window is None else (positions - self.window + 1).clamp(min=0)


@dataclass(frozen=True)
class Structure:
    """Statistics of every head, as (layers, heads) arrays, and of the hidden states after every layer.

    Attributes:
        layers: Indices of the layers.
        first: Mean weight on the first token, over the queries that see it.
        row_sum: Mean sum of a query's weights.
        entropy: Mean entropy of a query's weights in nats, after scaling them to sum to one.
        zeros: Share of the visible keys that get a weight of exactly 0.
        dead: Share of the queries whose weights sum to (almost) 0.
        largest: Largest absolute hidden state after each layer, shape (layers,).
        ratio: ``largest`` over the median absolute hidden state.
        kurtosis: Fourth standardised moment of the hidden states.
        tokens: Number of tokens that were read.
    """

    layers: list[int]
    first: np.ndarray
    row_sum: np.ndarray
    entropy: np.ndarray
    zeros: np.ndarray
    dead: np.ndarray
    largest: np.ndarray
    ratio: np.ndarray
    kurtosis: np.ndarray
    tokens: int

    @property
    def sink_rate(self) -> float:
        """Share of the heads that are sinks."""
        return float((self.first > SINK).mean())

    @property
    def dead_rate(self) -> float:
        """Share of the heads whose weights sum to (almost) 0 for at least 95% of the queries."""
        return float((self.dead >= 0.95).mean())

    def summary(self) -> dict[str, float]:
        """Returns one number for each statistic of the model."""
        return {
            "sink_rate": self.sink_rate,
            "dead_head_rate": self.dead_rate,
            "first_token_weight": float(self.first.mean()),
            "row_sum": float(self.row_sum.mean()),
            "entropy": float(self.entropy.mean()),
            "zero_share": float(self.zeros.mean()),
            "largest_activation": float(self.largest.max()),
            "largest_over_median": float(self.ratio.max()),
            "kurtosis": float(self.kurtosis.max()),
        }

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        values = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in asdict(self).items()}
        return {"schema": "attnswap.structure/1", **values, "summary": self.summary()}


def measure_structure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | Sequence[str] | None = None,
    window: int = 1024,
    windows: int = WINDOWS,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Structure:
    """Measures the attention weights and hidden states of a model, patched or not.

    The weights of a layer are freed before the next layer runs, so that the memory is that of one layer.

    Args:
        model: A causal language model, with or without a PEFT wrapper.
        tokenizer: The model's tokenizer.
        text: The text, or documents; default: the offline evaluation text.
        window: Tokens in a window, BOS included; more than 64.
        windows: Number of windows, at regular distances in the text.
        advance: Called after each window with the number of tokens read.

    Raises:
        ConfigError: The window is too short, or the text is shorter than the window.
        UnsupportedModelError: The model's attention modules return no weights, or weights of a non-causal model.
        NumericsError: A statistic is not finite.
    """
    if window <= FIRST_QUERY or windows < 1:
        raise ConfigError(f"window must be more than {FIRST_QUERY} tokens and windows at least 1")
    scorer = Scorer(model)
    scorer.check_positions(window)
    inputs = sample_windows(tokenizer, text, window, windows)
    inner: PreTrainedModel = base_of(model)
    config = inner.config.get_text_config()
    heads, states = _Heads(), _States()
    with scorer.eval_no_grad(), ExitStack() as stack:
        stack.enter_context(_weights_returned(inner))
        for layer, (name, module) in stacks_of(inner)[0].modules.items():
            stack.enter_context(_hook(module, heads.hook(layer, reach_of(module, config, layer))))
            stack.enter_context(_hook(inner.get_submodule(_block_of(name)), states.hook(layer)))
        for ids in inputs:
            scorer.body(input_ids=ids.to(scorer.device), use_cache=False, output_attentions=True)
            advance(window)
    if not heads.sums:
        raise UnsupportedModelError(
            f"the attention modules of {type(inner).__name__} return no attention weights, so their structure cannot "
            "be measured for this architecture"
        )
    layers = sorted(heads.sums)
    if len({len(heads.sums[layer]["first"]) for layer in layers}) > 1:
        raise UnsupportedModelError(f"the layers of {type(inner).__name__} have different numbers of heads")
    figures = {name: np.stack([heads.sums[i][name] / heads.calls[i] for i in layers]) for name in heads.sums[layers[0]]}
    figures |= {name: np.array([getattr(states, name)[i] for i in layers]) for name in ("largest", "ratio", "kurtosis")}
    for name, values in figures.items():
        if not np.isfinite(values).all():
            raise non_finite(f'the statistic "{name}" of {type(inner).__name__} is not finite')
    return Structure(layers=layers, **figures, tokens=len(inputs) * window)


def reach_of(module: nn.Module, config: PreTrainedConfig, layer: int) -> Reach:
    """Returns which earlier keys the queries of a layer see, by the attributes of module and config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] == "full_attention":  # the module may still have a window, which is not used
        return Reach()
    if hasattr(module, "sliding_window"):
        return Reach(window=module.sliding_window)  # type: ignore[arg-type]
    local = getattr(config, "attention_layers", None)  # of GPT-Neo
    if local is not None:
        return Reach(window=config.window_size if local[layer] == "local" else None)
    kind = "sliding_attention" if kinds is None else kinds[layer]
    if kind == "chunked_attention":
        return Reach(chunk=config.attention_chunk_size)
    if kind != "sliding_attention" or not getattr(config, "use_sliding_window", True):
        return Reach()
    return Reach(window=getattr(config, "sliding_window", None))


def _block_of(name: str) -> str:
    """Returns the name of the layer that an attention module is in: the module's name up to the layer's number."""
    words = name.split(".")
    place = next((i for i, word in enumerate(words) if word.isdigit()), len(words) - 2)
    return ".".join(words[: place + 1])


class _Heads:
    """Sums of each layer's statistics over the calls of its attention module."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, np.ndarray]] = {}
        self.calls: dict[int, int] = {}

    def hook(self, layer: int, reach: Reach) -> Any:
        """Returns a forward hook that reads the weights and removes them from the module's output."""

        def read_weights(module: nn.Module, args: Any, output: Any) -> Any:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                return None
            found = _figures(weights[0].float(), reach, type(module).__name__)
            known = self.sums.setdefault(layer, {})
            self.calls[layer] = self.calls.get(layer, 0) + 1
            for name, value in found.items():
                known[name] = known.get(name, 0.0) + value.double().cpu().numpy()
            return (output[0], None, *output[2:])

        return read_weights


def _figures(weights: Tensor, reach: Reach, module: str) -> dict[str, Tensor]:
    """Returns the statistics of one window, of the queries that see enough keys.

    Args:
        weights: Attention weights, shape (heads, queries, keys).
        reach: Which keys the layer's queries see.
        module: Class name of the attention module, for the error message.
    """
    queries, keys = weights.shape[1:]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=weights.device).tril(keys - queries)
    if bool((weights.masked_fill(causal, 0.0).abs() > 0).any()):  # NaN is reported later
        raise UnsupportedModelError(
            f"{module} attends to keys after the query, so it is not causal, and its structure cannot be measured"
        )
    first = reach.first_keys(torch.arange(keys - queries, keys, device=weights.device))
    visible = causal & (torch.arange(keys, device=weights.device) >= first[:, None])
    rows, visible = weights[:, FIRST_QUERY:], visible[FIRST_QUERY:]
    total = rows.sum(-1)
    share = rows.clamp(min=0) / total.clamp(min=1e-12)[..., None]
    return {
        "first": rows[..., 0].sum(-1) / visible[:, 0].sum().clamp(min=1),
        "row_sum": total.mean(-1),
        "entropy": torch.special.entr(share).sum(-1).mean(-1),
        "zeros": ((rows == 0) & visible).sum((-1, -2)) / visible.sum(),
        "dead": (total.abs() < DEAD).float().mean(-1),
    }


class _States:
    """The largest value over windows of each statistic of the hidden states."""

    def __init__(self) -> None:
        self.largest: dict[int, float] = {}
        self.ratio: dict[int, float] = {}
        self.kurtosis: dict[int, float] = {}

    def hook(self, layer: int) -> Any:
        """Returns a forward hook that reads the hidden states after a layer."""

        def read_states(module: nn.Module, args: Any, output: Any) -> None:
            hidden = (output[0] if isinstance(output, tuple) else output).float()
            size = hidden.abs()
            centred = hidden - hidden.mean()
            found = {
                "largest": float(size.max()),
                "ratio": float(size.max() / size.median().clamp(min=1e-12)),
                "kurtosis": float(centred.pow(4).mean() / centred.square().mean().square().clamp(min=1e-24)),
            }
            for name, value in found.items():
                known = getattr(self, name)
                largest = known.get(layer, 0.0)
                known[layer] = largest if largest >= value or largest != largest else value  # NaN stays NaN

        return read_states


@contextmanager
def _hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _weights_returned(model: PreTrainedModel) -> Iterator[None]:
    """Switches a model to an attention implementation that returns weights. That of attnswap always does."""
    config = model.config.get_text_config()
    previous = config._attn_implementation
    if previous in (KEY, "eager"):
        yield
        return
    if not is_patched(model):
        model.set_attn_implementation("eager")
    # Models without transformers' attention interface ignore the call above with a warning, and so do those whose
    # softmax is patched. They compute weights in any case, but make their masks by this setting.
    own = config._attn_implementation != "eager"
    if own:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        if own:
            config._attn_implementation_internal = previous
        else:
            model.set_attn_implementation(previous)
