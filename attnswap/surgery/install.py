"""What attnswap changes of transformers for the whole process: three methods, each as before for unpatched models."""

import functools
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.surgery.previous import check_implementation
from attnswap.surgery.rebuild import rebuild
from attnswap.surgery.spec import KEY, PatchSpec, with_towers

PREFIX = "AttnSwap"
"""Before the names of a patched model's ``architectures`` in config.json.

Programs that build models of their own by these names (inference servers, converters) would compute softmax where they
ignore tensors they do not know. They refuse a name they do not know. transformers goes by the model type.
"""


def install() -> None:
    """Wraps the start and end of a model's construction, and the writing of configs, once.

    A config with a spec rebuilds its swaps while its model is built, and is written under architecture names that only
    attnswap's readers take for known ones.
    """
    create, original, to_dict = PreTrainedModel.__init__, PreTrainedModel.post_init, PreTrainedConfig.to_dict
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

    @functools.wraps(to_dict)
    def named(self: PreTrainedConfig) -> dict[str, Any]:
        return rename(to_dict(self))

    post_init._attnswap = True  # type: ignore[attr-defined]
    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedConfig.to_dict = named  # type: ignore[method-assign]


def settle(config: Any) -> None:
    """Prepares a config with a spec for building its model.

    A model that computes its attention itself chooses its modules by the implementation it had.

    Raises:
        CheckpointError: The spec is damaged.
    """
    values = getattr(config, KEY, None)
    spec = PatchSpec.from_dict(values) if isinstance(values, dict) else None
    if spec is not None and spec.seam == "scores" and config._attn_implementation == KEY:
        check_implementation(spec.before)
        config._attn_implementation_internal = spec.before
    names = _strings(getattr(config, "architectures", None))
    if any(name.startswith(PREFIX) for name in names):
        config.architectures = [name.removeprefix(PREFIX) for name in names]


def rename(values: dict[str, Any]) -> dict[str, Any]:
    """Marks the architecture names of a config's values, if it or a part of it has a spec."""
    names = _strings(values.get("architectures"))
    if names and any(isinstance(part.get(KEY), dict) for part in with_towers(values)):
        values["architectures"] = [name if name.startswith(PREFIX) else PREFIX + name for name in names]
    return values


def _strings(names: Any) -> list[str]:
    """Returns a list of strings as it is, and an empty one for anything else."""
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
