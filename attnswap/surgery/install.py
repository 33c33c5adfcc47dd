"""The six methods of transformers that attnswap wraps for the whole process; unpatched models behave as before."""

import functools
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from attnswap.surgery.loaded import check_whole
from attnswap.surgery.owners import record
from attnswap.surgery.previous import check_implementation
from attnswap.surgery.rebuild import rebuild
from attnswap.surgery.saving import config_in_sync
from attnswap.surgery.spec import KEY, read_entry, with_towers

PREFIX = "AttnSwap"
"""Before the names of a patched model's ``architectures`` in config.json.

Programs that build models of their own by these names (inference servers, converters) would compute softmax where they
ignore tensors they do not know. They refuse a name they do not know. transformers itself finds the class by the
model type. A config that was read has the original names again, because trainers look up the class by them.
"""

WEIGHTS = "output_attentions"
"""The key of an entry that says that the config asks for attention weights."""


def install() -> None:
    """Wraps how models are built, saved and loaded, and how configs are made and written, once.

    A model whose config has an entry gets its swaps while it is built. Such a config is written with architecture names
    that other programs do not know. A model is saved only with a config that names its swaps, and a patched checkpoint
    loads only if no tensor is missing.
    """
    create, original, to_dict = PreTrainedModel.__init__, PreTrainedModel.post_init, PreTrainedConfig.to_dict
    save, load = PreTrainedModel.save_pretrained, PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    made = PreTrainedConfig.__post_init__
    if getattr(original, "_attnswap", False):
        return

    @functools.wraps(create)
    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        prepare_config(config)
        create(self, config, *args, **kwargs)

    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        rebuild(self)
        original(self)
        record(self)

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with config_in_sync(self, args[2] if len(args) > 2 else kwargs.get("state_dict")):
            return save(self, *args, **kwargs)

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, found = load(cls, *args, output_loading_info=True, **kwargs)
        check_whole(model, found, args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        return (model, found) if output_loading_info else model

    @functools.wraps(made)
    def __post_init__(self: PreTrainedConfig, **kwargs: Any) -> None:
        made(self, **kwargs)
        if isinstance(self.architectures, list):
            self.architectures = [x.removeprefix(PREFIX) if isinstance(x, str) else x for x in self.architectures]

    @functools.wraps(to_dict)
    def named(self: PreTrainedConfig) -> dict[str, Any]:
        return mark_architectures(to_dict(self))

    post_init._attnswap = True  # type: ignore[attr-defined]
    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign,assignment]
    PreTrainedConfig.__post_init__ = __post_init__  # type: ignore[method-assign]
    PreTrainedConfig.to_dict = named  # type: ignore[method-assign]


def prepare_config(config: Any) -> None:
    """Prepares a config with an entry for building its model.

    A model that computes its attention itself chooses its modules by the implementation it had.

    Raises:
        CheckpointError: The spec is damaged.
    """
    values = getattr(config, KEY, None)
    if not isinstance(values, dict):
        return
    for spec in read_entry(values):
        if spec.seam == "scores" and config._attn_implementation == KEY:
            check_implementation(spec.before)
            config._attn_implementation_internal = spec.before
    if values.get(WEIGHTS):
        config._output_attentions = True


def mark_architectures(values: dict[str, Any]) -> dict[str, Any]:
    """Marks the architecture names of a config's values, if it or a part of it has a spec.

    ``output_attentions`` moves into the entry, since transformers accepts it with "eager" attention only.
    """
    for part in with_towers(values):
        if isinstance(part.get(KEY), dict) and part.get("output_attentions"):
            part |= {KEY: {**part[KEY], WEIGHTS: True}, "output_attentions": False}
    names = _strings(values.get("architectures"))
    if names and any(isinstance(part.get(KEY), dict) for part in with_towers(values)):
        values["architectures"] = [name if name.startswith(PREFIX) else PREFIX + name for name in names]
    return values


def _strings(names: Any) -> list[str]:
    """Returns a list of strings as it is, and an empty one for anything else."""
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
