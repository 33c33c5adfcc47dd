"""What attention does: sinks, sparsity, entropy, dead heads, and the massive activations that go with sinks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from attnswap.errors import ConfigError, UnsupportedModelError, non_finite
from attnswap.evaluation.corpus import WINDOWS, spread_windows
from attnswap.evaluation.scoring import Scorer
from attnswap.surgery.body import base_of
from attnswap.surgery.entry import is_patched
from attnswap.surgery.patched import stacks_of
from attnswap.surgery.spec import KEY

SINK = 0.3
"""A head is a sink if its queries give the first token more than this on average."""
FIRST_QUERY = 64
"""Queries before it see too few keys to say anything of a head."""
DEAD = 1e-6
"""A row whose weights sum to less attends to nothing."""


@dataclass(frozen=True)
class Reach:
    """How far back the queries of a layer see; with neither: to the first key.

    Attributes:
        window: A query sees so many keys at most, its own included.
        chunk: A query sees the keys of its own chunk of so many tokens.
    """

    window: int | None = None
    chunk: int | None = None

    def first_keys(self, positions: Tensor) -> Tensor:
        """Returns the first key that the queries at these positions see."""
        if self.chunk is not None:
            return positions // self.chunk * self.chunk
        return torch.zeros_like(positions) if self.window is None else (positions - self.window + 1).clamp(min=0)


@dataclass(frozen=True)
class Structure:
    """Figures of every head, as (layers, heads) arrays, and of the hidden states after every layer.

    Attributes:
        layers: Indices of the layers.
        first: Mean weight on the first token, over the queries that see it.
        row_sum: Mean sum of a query's weights.
        entropy: Mean entropy of a query's weights, scaled to sum to one, in nats.
        zeros: Share of the visible keys that get a weight of exactly 0.
        dead: Share of the queries whose weights sum to nothing.
        largest: Largest absolute hidden state after each layer, shape (layers,).
        ratio: ``largest`` over the median absolute hidden state.
        kurtosis: Fourth standardised moment of the hidden states.
        tokens: Tokens read.
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
        """Share of the heads that attend to nothing for at least 95% of the queries."""
        return float((self.dead >= 0.95).mean())

    def summary(self) -> dict[str, float]:
        """Returns one number for each figure."""
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
    """Measures how a model attends, patched or not.

    Weights are looked at layer by layer and never kept: memory is that of one layer's weights.

    Args:
        model: A causal language model; a peft wrapper is looked through.
        tokenizer: Its tokenizer.
        text: The text, or documents; default: the offline evaluation text.
        window: Tokens of a window, BOS included, more than 64.
        windows: How many windows, from all over the text.
        advance: Called with the number of tokens read.

    Raises:
        ConfigError: The window is too short or the text shorter than it.
        UnsupportedModelError: The model's attention modules return no weights, or not those of a causal model.
        NumericsError: A figure is not finite.
    """
    if window <= FIRST_QUERY or windows < 1:
        raise ConfigError(f"window must be more than {FIRST_QUERY} tokens and windows at least 1")
    scorer = Scorer(model)
    scorer.check_positions(window)
    inputs = spread_windows(tokenizer, text, window, windows)
    inner: PreTrainedModel = base_of(model)
    config = inner.config.get_text_config()
    heads, states = _Heads(), _States()
    with scorer.ready(), ExitStack() as stack:
        stack.enter_context(_weights_returned(inner))
        for layer, (name, module) in stacks_of(inner)[0].modules.items():
            stack.enter_context(_hook(module, heads.of(layer, reach_of(module, config, layer))))
            stack.enter_context(_hook(inner.get_submodule(_block_of(name)), states.of(layer)))
        for ids in inputs:
            scorer.body(input_ids=ids.to(scorer.device), use_cache=False, output_attentions=True)
            advance(window)
    if not heads.sums:
        raise UnsupportedModelError(f"the attention modules of {type(inner).__name__} return no weights")
    layers = sorted(heads.sums)
    if len({len(heads.sums[layer]["first"]) for layer in layers}) > 1:
        raise UnsupportedModelError(f"the layers of {type(inner).__name__} have different numbers of heads")
    figures = {name: np.stack([heads.sums[i][name] / heads.calls[i] for i in layers]) for name in heads.sums[layers[0]]}
    figures |= {name: np.array([getattr(states, name)[i] for i in layers]) for name in ("largest", "ratio", "kurtosis")}
    for name, values in figures.items():
        if not np.isfinite(values).all():
            raise non_finite(f"{type(inner).__name__} gives a non-finite {name}")
    return Structure(layers=layers, **figures, tokens=len(inputs) * window)


def reach_of(module: nn.Module, config: PreTrainedConfig, layer: int) -> Reach:
    """Returns which keys the queries of a layer see: all before, those within a window, or those of a chunk."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] == "full_attention":  # some name a window that they do not use
        return Reach()
    if hasattr(module, "sliding_window"):
        return Reach(window=module.sliding_window)  # type: ignore[arg-type]
    local = getattr(config, "attention_layers", None)  # GPT-Neo's
    if local is not None:
        return Reach(window=config.window_size if local[layer] == "local" else None)
    kind = "sliding_attention" if kinds is None else kinds[layer]
    if kind == "chunked_attention":
        return Reach(chunk=config.attention_chunk_size)
    if kind != "sliding_attention" or not getattr(config, "use_sliding_window", True):
        return Reach()
    return Reach(window=getattr(config, "sliding_window", None))


def _block_of(name: str) -> str:
    """Returns the name of the layer that an attention module is in: all up to its number."""
    words = name.split(".")
    place = next((i for i, word in enumerate(words) if word.isdigit()), len(words) - 2)
    return ".".join(words[: place + 1])


class _Heads:
    """Sums of each layer's figures over the calls of its attention."""

    def __init__(self) -> None:
        self.sums: dict[int, dict[str, np.ndarray]] = {}
        self.calls: dict[int, int] = {}

    def of(self, layer: int, reach: Reach) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> Any:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not isinstance(weights, Tensor) or weights.ndim != 4:
                return None
            found = _figures(weights[0].float(), reach, type(module).__name__)
            known = self.sums.setdefault(layer, {})
            self.calls[layer] = self.calls.get(layer, 0) + 1
            for name, value in found.items():
                known[name] = known.get(name, 0.0) + value.double().cpu().numpy()
            return (output[0], None, *output[2:])

        return look


def _figures(weights: Tensor, reach: Reach, module: str) -> dict[str, Tensor]:
    """Returns the figures of one window's weights (heads, queries, keys), of the queries that see enough keys.

    Args:
        weights: Shape (heads, queries, keys).
        reach: Which keys the layer's queries see.
        module: Whose they are.
    """
    queries, keys = weights.shape[1:]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=weights.device).tril(keys - queries)
    if bool((weights.masked_fill(causal, 0.0).abs() > 0).any()):  # NaN is told of later
        raise UnsupportedModelError(
            f"{module} gives weight to keys that come after their query: its weights are not those of a causal model"
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
    """The largest figures of the hidden states over windows."""

    def __init__(self) -> None:
        self.largest: dict[int, float] = {}
        self.ratio: dict[int, float] = {}
        self.kurtosis: dict[int, float] = {}

    def of(self, layer: int) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
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
                before = known.get(layer, 0.0)
                known[layer] = before if before >= value or before != before else value  # NaN stays

        return look


@contextmanager
def _hook(module: nn.Module, look: Any) -> Iterator[None]:
    handle = module.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _weights_returned(model: PreTrainedModel) -> Iterator[None]:
    """Makes a model compute weights that can be returned; one whose attention function is ours always can."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before in (KEY, "eager"):
        yield
        return
    if not is_patched(model):
        model.set_attn_implementation("eager")
    # Models without an attention interface only warn and stay, and so do those whose softmax is patched: their masks
    # are made by this setting, their weights computed without it.
    own = config._attn_implementation != "eager"
    if own:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        if own:
            config._attn_implementation_internal = before
        else:
            model.set_attn_implementation(before)
