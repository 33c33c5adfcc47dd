"""The config of a swap adapter: LoRA's config with a swap."""

import copy
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from attnswap.adapters.kind import peft_type
from attnswap.errors import ConfigError
from attnswap.surgery.move import check_one_ramp
from attnswap.surgery.select import whole_numbers
from attnswap.swaps import Swap, resolve


@dataclass
class AttnSwapConfig(LoraConfig):
    """Configures an adapter that swaps the attention normalizer and, if you want, has low-rank weights too.

    ``get_peft_model(model, AttnSwapConfig(swap="ssmax", r=8, target_modules=["q_proj", "v_proj"]))`` takes every
    argument of ``LoraConfig``. Without ``target_modules`` there are no low-rank weights: the adapter is the swap alone.

    Args:
        swap: A name, config or mapping with a name; or a mapping of several to their heads, as for
            :func:`attnswap.patch`.
        part: Which attention modules, in a model that has several kinds: encoder, decoder, cross, ...
        layers: Index, slice string or list of indices; default: all.
        heads: Query heads; default: all.
        ramp: Initial lambda, from 0 to 1. ``attnswap.describe`` and ``spec`` of a saved adapter give the present one.
        spec: The swaps of each layer. Written when the adapter is saved; leave it out.
        fingerprint: Identifies the base model when the adapter is loaded: its sizes and a few of its weights. Set when
            the adapter is created; ``None`` skips the check.

    Raises:
        ConfigError: The swap does not exist, or a value is invalid.
    """

    swap: Any = field(default=None, metadata={"help": "The attention normalizer, as for attnswap.patch."})
    part: str | None = field(default=None, metadata={"help": "Which attention modules: encoder, decoder, cross, ..."})
    layers: Any = field(default=None, metadata={"help": "Layers to swap: index, slice string or list."})
    heads: Any = field(default=None, metadata={"help": "Query heads to swap; default: all."})
    ramp: float = field(default=1.0, metadata={"help": "lambda to start at: 0 is softmax, 1 the swap."})
    spec: dict[str, Any] | None = field(default=None, metadata={"help": "The swaps of each layer."})
    fingerprint: dict[str, Any] | None = field(default=None, metadata={"help": "Sizes and weights of the base."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._adapter: str | None = None  # identifies the adapter of this process that the config belongs to
        self.peft_type = peft_type()
        if self.swap is None:
            raise ConfigError(
                'AttnSwapConfig needs a swap, such as swap="ssmax"; for low-rank weights alone use LoraConfig'
            )
        self.swap = _plain(self.swap)
        if callable(self.layers):
            raise ConfigError("layers of an adapter are written to a file: give an index, a slice string or a list")
        self.ramp = check_one_ramp(self.ramp)
        if not isinstance(self.layers, str | None):
            self.layers = whole_numbers(self.layers, "a layer index")
        self.heads = _heads(self.heads)
        if self.target_modules is None and not self.target_parameters:
            # peft would adapt its own choice of modules instead.
            self.target_modules = DUMMY_TARGET_MODULES

    def for_adapter(self) -> Self:
        """Returns a copy for a new adapter, which writes into it: one config may be passed for several adapters."""
        config = copy.deepcopy(self)
        if self._adapter is not None:  # spec and fingerprint are those of an earlier adapter
            config.spec = config.fingerprint = None
        config._adapter = uuid.uuid4().hex
        return config

    def is_copy_of(self, other: Any) -> bool:
        """Whether this config is that of the adapter of another config, or a copy of it."""
        return self._adapter is not None and self._adapter == getattr(other, "_adapter", None)

    def swaps(self) -> Any:
        """Returns the swap as :func:`attnswap.patch` takes it."""
        if isinstance(self.swap, list):
            return {resolve(entry["swap"]): entry["heads"] for entry in self.swap}
        return resolve(self.swap)


def _heads(heads: Any) -> list[int] | None:
    return None if heads is None else whole_numbers(heads, "a head")


def _plain(swap: Any) -> Any:
    """Returns a swap as JSON-able values."""
    if isinstance(swap, Mapping) and "name" not in swap:
        return [{"swap": resolve(one).to_dict(), "heads": _heads(heads)} for one, heads in swap.items()]
    if isinstance(swap, list):  # as above, read from a file
        if not all(isinstance(entry, Mapping) and {"swap", "heads"} <= entry.keys() for entry in swap):
            raise ConfigError(f"a list of swaps must have entries with a swap and its heads, not {swap!r}")
        return [{"swap": resolve(entry["swap"]).to_dict(), "heads": _heads(entry["heads"])} for entry in swap]
    return swap.to_dict() if isinstance(swap, Swap) else resolve(swap).to_dict()
