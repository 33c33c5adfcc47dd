"""What attnswap changes of transformers for the whole process: four methods, each as before for unpatched models."""

import functools
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.surgery.rebuild import rebuild
from attnswap.surgery.spec import KEY, PatchSpec, with_towers

PREFIX = "AttnSwap"
"""Before the names of a patched model's ``architectures`` in config.json.

Programs that build models of their own by these names (inference servers, converters) would compute softmax where they
ignore tensors they do not know. They refuse a name they do not know. transformers goes by the model type. A config that
was read has the true names again: trainers look the class to load with up by them.
"""


def install() -> None:
    """Wraps the start and end of a model's construction, and the making and writing of configs, once.

    A config with a spec rebuilds its swaps while its model is built, and is written under architecture names that only
    attnswap's readers take for known ones.
    """
    create, original, to_dict = PreTrainedModel.__init__, PreTrainedModel.post_init, PreTrainedConfig.to_dict
    made = PreTrainedConfig.__post_init__
    if getattr(original, "_attnswap", False):
        return

    @functools.wraps(create)
    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        settle(config)
        create(self, config, *args, **kwargs)

    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        rebuild(self)
        original(self)

    @functools.wraps(made)
    def __post_init__(self: PreTrainedConfig, **kwargs: Any) -> None:
        made(self, **kwargs)
        if isinstance(self.architectures, list):
            self.architectures = [x.removeprefix(PREFIX) if isinstance(x, str) else x for x in self.architectures]

    @functools.wraps(to_dict)
    def named(self: PreTrainedConfig) -> dict[str, Any]:
        return rename(to_dict(self))

    post_init._attnswap = True  # type: ignore[attr-defined]
    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedConfig.__post_init__ = __post_init__  # type: ignore[method-assign]
    PreTrainedConfig.to_dict = named  # type: ignore[method-assign]


def settle(config: Any) -> None:
    """Prepares a config with a spec for building its model.

    A model that computes its attention itself chooses its modules by the implementation it had.
    """
    values = getattr(config, KEY, None)
    if isinstance(values, dict) and values.get("seam") == "scores" and config._attn_implementation == KEY:
        config._attn_implementation_internal = PatchSpec.from_dict(values).before
    names = getattr(config, "architectures", None)
    if isinstance(names, list) and any(name.startswith(PREFIX) for name in names):
        config.architectures = [name.removeprefix(PREFIX) for name in names]


def rename(values: dict[str, Any]) -> dict[str, Any]:
    """Marks the architecture names of a config's values, if it or a part of it has a spec."""
    names = values.get("architectures")
    if isinstance(names, list) and any(isinstance(part.get(KEY), dict) for part in with_towers(values)):
        values["architectures"] = [name if name.startswith(PREFIX) else PREFIX + name for name in names]
    return values
