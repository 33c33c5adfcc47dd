"""The six methods of transformers that attnswap wraps for the whole process; unpatched models behave as before."""

import functools
from typing import Any

from attnswap.imports import after_import

PREFIX = "AttnSwap"
"""Before the names of a patched model's ``architectures`` in config.json.

Programs that build models of their own by these names (inference servers, converters) would compute softmax where they
ignore tensors they do not know. They refuse a name they do not know. transformers itself finds the class by the
model type. A config that was read has the original names again, because trainers look up the class by them.
"""

WEIGHTS = "output_attentions"
"""The key of an entry that says that the config asks for attention weights."""


def install() -> None:
    """Wraps the methods: now if transformers is imported already, else right after its import."""
    after_import("transformers.configuration_utils", lambda module: wrap_config(module.PreTrainedConfig))
    after_import("transformers.modeling_utils", lambda module: wrap_model(module.PreTrainedModel))


# The wrappers import what they need when they are called. They are installed while transformers is being imported,
# often by a module of attnswap that they need and that is itself only half imported at that moment.


def wrap_config(cls: Any) -> None:
    """Wraps how configs are made and written, once.

    A config with an entry is written with architecture names that other programs do not know.
    """
    made, to_dict = cls.__post_init__, cls.to_dict
    if hasattr(to_dict, "_attnswap"):
        return

    @functools.wraps(made)
    def __post_init__(self: Any, **kwargs: Any) -> None:
        made(self, **kwargs)
        if isinstance(self.architectures, list):
            self.architectures = [x.removeprefix(PREFIX) if isinstance(x, str) else x for x in self.architectures]

    @functools.wraps(to_dict)
    def named(self: Any) -> dict[str, Any]:
        return mark_architectures(to_dict(self))

    named._attnswap = True  # type: ignore[attr-defined]
    cls.__post_init__, cls.to_dict = __post_init__, named


def wrap_model(cls: Any) -> None:
    """Wraps how models are built, saved and loaded, once.

    A model whose config has an entry gets its swaps while it is built. A model is saved only with a config that names
    its swaps, and a patched checkpoint loads only if no tensor is missing.
    """
    create, original = cls.__init__, cls.post_init
    save, load = cls.save_pretrained, cls.from_pretrained.__func__
    if hasattr(original, "_attnswap"):
        return

    @functools.wraps(create)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from attnswap.surgery import seam  # noqa: F401  # with it, transformers knows the attention function

        prepare_config(config)
        create(self, config, *args, **kwargs)

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        from attnswap.surgery.owners import record
        from attnswap.surgery.rebuild import rebuild

        rebuild(self)
        original(self)
        record(self)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        from attnswap.surgery.saving import config_in_sync

        with config_in_sync(self, args[2] if len(args) > 2 else kwargs.get("state_dict")):
            return save(self, *args, **kwargs)

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        from attnswap.surgery.loaded import check_whole

        model, found = load(cls, *args, output_loading_info=True, **kwargs)
        check_whole(model, found, args[0] if args else kwargs.get("pretrained_model_name_or_path"), kwargs)
        return (model, found) if output_loading_info else model

    post_init._attnswap = True  # type: ignore[attr-defined]
    cls.__init__, cls.post_init, cls.save_pretrained = __init__, post_init, save_pretrained
    cls.from_pretrained = classmethod(from_pretrained)


def prepare_config(config: Any) -> None:
    """Prepares a config with an entry for building its model.

    A model that computes its attention itself chooses its modules by the implementation it had.

    Raises:
        CheckpointError: The entry is damaged.
    """
    from attnswap.surgery.previous import check_implementation
    from attnswap.surgery.spec import KEY, read_entry

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
    """Marks the architecture names of a config's values, if it or one of its towers has an entry.

    ``output_attentions`` moves into the entry, since transformers accepts it with "eager" attention only.
    """
    from attnswap.surgery.spec import KEY, with_towers

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
