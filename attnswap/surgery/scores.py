"""The seam to models that compute attention themselves, rather than through transformers' attention interface.

While one of their attention modules runs, its call of ``softmax`` (or of torch's ``scaled_dot_product_attention``) is
intercepted and computed by the layer's swaps. Everything that the model adds to its scores beforehand (masks, ALiBi,
learned positions) is then part of the scores: a swap that scales scores scales it too.
"""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from attnswap.attention.heads import pick
from attnswap.attention.visibility import Visibility, split_mask
from attnswap.errors import UnsupportedModelError
from attnswap.surgery import combine
from attnswap.surgery.call import LayerCall
from attnswap.surgery.masks import refuse_soft_mask
from attnswap.surgery.spec import KEY, Slot
from attnswap.surgery.stacks import code_of

SOFTMAXES = {torch.softmax, Tensor.softmax, torch.nn.functional.softmax, torch.special.softmax}
HIDDEN = -1e6
"""Scores at or below this are of hidden keys. Position biases go far: ALiBi reaches -5e4 in a context of 65k tokens."""
WRITTEN = -1e4
"""The score that the first GPT writes for a hidden key."""


class SoftmaxInterception(TorchFunctionMode):
    """Replaces the softmax of one attention module during one forward.

    Args:
        module: The attention module.
        call: Its swaps.
    """

    def __init__(self, module: nn.Module, call: LayerCall) -> None:
        super().__init__()
        assert call.info is not None
        self.module, self.call = module, call
        self.heads, self.kv_heads = call.info.heads, call.info.kv_heads

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Computes a softmax or an attention function by the layer's swaps, and any other function as it is."""
        kwargs = kwargs or {}
        if func in SOFTMAXES:
            return self._once(self._softmax, func, *args, **kwargs)
        if func is scaled_dot_product_attention:
            return self._once(self._attention, *args, **kwargs)
        return func(*args, **kwargs)

    def _once(self, compute: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.call.served:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} computes more than one softmax in a forward; attnswap cannot tell which "
                "of them are its attention weights"
            )
        self.call.served = True
        return compute(*args, **kwargs)

    def _softmax(
        self, func: Callable[..., Tensor], scores: Tensor, dim: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        stock = func(scores, dim, *args, **kwargs)
        shape = scores.shape
        if len(shape) == 3 and shape[0] % self.heads == 0:  # batch and heads in one dimension
            scores = scores.view(-1, self.heads, *shape[1:])
        if scores.ndim != 4 or scores.shape[1] != self.heads or dim not in (-1, len(shape) - 1):
            raise UnsupportedModelError(
                f"{type(self.module).__name__} takes a softmax over dimension {dim} of a tensor of shape "
                f"{tuple(shape)}, which is not (batch, {self.heads} heads, queries, keys)"
            )
        weights = self._weights(scores, stock.view(scores.shape))
        return weights.to(stock.dtype).view(shape)

    def _weights(self, scores: Tensor, stock: Tensor) -> Tensor:
        """Returns the weights of every head, those that have no swap as the model's own softmax gave them."""
        hidden = _hidden(self.module, scores)
        scores = scores if scores.dtype == torch.float64 else scores.float()
        one = hidden[:, :1]
        visible = ~(one if bool((hidden == one).all()) else hidden)
        queries, keys = scores.shape[2:]
        offset = self.call.offset(queries, keys)
        bare = scores.new_empty(*scores.shape[:3], 0), scores.new_empty(len(scores), self.kv_heads, keys, 0)
        layer = combine.LayerInputs(
            query=bare[0],
            key=bare[1],
            value=bare[1],
            visibility=Visibility(queries, keys, scores.device, False, offset, dense=visible),
            scaling=1.0,
            softcap=None,
            sinks=None,
            dropout=0.0,
            content=scores.masked_fill(hidden, 0.0),
            seed=combine.seed_for(self.call.slots, self.module.training, scores.device),
        )
        slots, features = self.call.slots, self.call.all_features(layer.visibility)
        combine.observe_inactive(layer, slots, features, self.call.observed)
        result = self._served(layer, slots, features, stock)
        if self.call.watch is not None:  # scores stand for the query here, and weights for the output
            self.call.watch(self.call, scores, result, 1)
        if self.call.gains is None:
            return result
        return self._served(layer, *combine.as_softmax(slots), stock) * self.call.gains[:, None, None]

    def _served(
        self,
        layer: combine.LayerInputs,
        slots: dict[str, Slot],
        features: dict[str, dict[str, Tensor]],
        result: Tensor,
    ) -> Tensor:
        """Returns weights in which those of the slots' heads are the slots'."""
        for name, slot in slots.items():
            if slot.phase == "before":
                continue
            problem = combine.slot_problem(layer, slot, features[name])
            if self.call.observed is not None:
                self.call.observed(name, problem)
            _, share = combine.dense_part(problem, problem.query)
            value_scale = problem.regular().terms.value_scale
            if value_scale is not None:
                share = share * value_scale.repeat_interleave(share.shape[1] // value_scale.shape[1], 1)[..., None, :]
            chosen = torch.tensor(slot.heads or range(self.heads), device=share.device)
            result = result.to(share.dtype).index_copy(1, chosen, share)
        return result

    def _by_key_head(self, features: dict[str, dict[str, Tensor]], heads: int) -> dict[str, dict[str, Tensor]]:
        """Repeats what is kept per key/value head where the model repeats keys and values for the heads that share."""
        for slot, static in self.call.slots.items() if heads != self.kv_heads else ():
            for name, feature in static.swap.features().items():
                if feature.heads == "kv" and feature.per == "key":
                    features[slot][name] = features[slot][name].repeat_interleave(heads // self.kv_heads, 1)
        return features

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.ndim != 4 or query.shape[1] != self.heads:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} attends with queries of shape {tuple(query.shape)}, which is not "
                f"(batch, {self.heads} heads, queries, head_dim)"
            )
        queries, keys = query.shape[2], key.shape[2]
        dense, bias = (None, None) if attn_mask is None else split_mask(attn_mask, (*query.shape[:3], keys))
        # torch aligns the first query with the first key.
        offset = 0 if is_causal else self.call.offset(queries, keys)
        layer = combine.LayerInputs(
            query=query,
            key=key,
            value=value,
            visibility=Visibility(queries, keys, query.device, is_causal, offset, dense=dense, bias=bias),
            scaling=query.shape[-1] ** -0.5 if scale is None else scale,
            softcap=None,
            sinks=None,
            dropout=dropout_p,
            seed=combine.seed_for(self.call.slots, self.module.training, query.device),
        )
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        previous = _Stock(query, key, value, attn_mask, options)
        features = self._by_key_head(self.call.all_features(layer.visibility), key.shape[1])
        out = combine.attend(layer, self.call.slots, features, previous, False, self.call.observed)[0].transpose(1, 2)
        if self.call.watch is not None:
            self.call.watch(self.call, query, out, 1)
        if self.call.gains is None:
            return out
        out = combine.attend(layer, *combine.as_softmax(self.call.slots), previous, False)[0].transpose(1, 2)
        return out * self.call.gains[:, None, None].to(out.dtype)


def _hidden(module: nn.Module, scores: Tensor) -> Tensor:
    """Returns which scores stand for hidden keys, as a module writes them in the dtype it computes in."""
    hidden = scores <= _hidden_from(module, scores.dtype)
    kind: Any = type(module)
    return hidden | (scores == WRITTEN) if _writes(kind) else hidden


def _hidden_from(module: nn.Module, dtype: torch.dtype) -> float:
    """Returns the largest number that stands for a hidden key: fp16 has none as small as :data:`HIDDEN`."""
    dtypes = {dtype, *(p.dtype for p in module.parameters(recurse=True) if p.is_floating_point())}
    dtypes |= {torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
    return max(HIDDEN, *(torch.finfo(d).min / 2 for d in dtypes))


@functools.cache
def _writes(kind: Any) -> bool:
    """Whether the code of a class of modules writes :data:`WRITTEN`."""
    return re.search(r"-\s*(1e4|10000)\b", code_of(kind)) is not None


@dataclass(frozen=True)
class _Stock:
    """The call of torch's attention function that a model made."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]

    def some_heads(self, heads: Sequence[int]) -> Tensor:
        """Computes some heads, shape (batch, len(heads), queries, value_dim)."""
        out = scaled_dot_product_attention(self.query, self.key, self.value, self.mask, **self.options)
        return pick(out, heads)

    def kernel(self, heads: Sequence[int] | None) -> None:
        """Returns None: torch's own kernel is used."""


class InterceptedForward:
    """The forward of such a module: its own forward with the softmax intercepted.

    It is the module's ``forward`` rather than a pair of hooks, since hooks do not run when Ctrl-C ends a forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original = module.__dict__.get("forward")  # another library's, such as one that offloads
        self.disabled = False  # the module runs as if it had never been patched, while a patch is being verified

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        call = kwargs.pop(KEY, None)
        forward = self.original or functools.partial(type(self.module).forward, self.module)
        if self.disabled:
            return forward(*args, **kwargs)
        if call is None:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} was called without its hooks, which bring its swaps: call the module "
                "itself, and not its forward method"
            )
        if not call.slots:
            call.served = True
            return forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise UnsupportedModelError(
                f"{type(self.module).__name__} computes its attention itself, and torch.compile cannot trace how its "
                "softmax is replaced; run this model without torch.compile"
            )
        for mask in (*args[1:], *kwargs.values()):
            if isinstance(mask, Tensor) and mask.ndim > 1 and mask.is_floating_point():
                refuse_soft_mask(self.module, mask.masked_fill(mask <= _hidden_from(self.module, mask.dtype), 0))
        with SoftmaxInterception(self.module, call):
            return forward(*args, **kwargs)


def intercept(module: nn.Module) -> None:
    """Puts :class:`InterceptedForward` around a module's forward."""
    if not isinstance(module.__dict__.get("forward"), InterceptedForward):
        module.forward = InterceptedForward(module)


def release(module: nn.Module) -> None:
    """Undoes :func:`intercept`; a forward that another library has wrapped since stays, and passes everything on."""
    mine = module.__dict__.get("forward")
    if isinstance(mine, InterceptedForward):
        if mine.original is None:
            del module.__dict__["forward"]
        else:
            module.forward = mine.original
