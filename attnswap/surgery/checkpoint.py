"""Reload what was saved: the swaps are rebuilt from ``config.json`` while transformers constructs the model."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from attnswap.errors import AttnSwapError, CheckpointError
from attnswap.surgery.loaded import HUB
from attnswap.surgery.patched import patched_stacks
from attnswap.surgery.probe import verify
from attnswap.surgery.spec import KEY


def from_pretrained(path: str | Path, *, auto_class: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """Loads a patched checkpoint and verifies that its swaps are computed.

    ``AutoModelForCausalLM.from_pretrained`` loads the same model once attnswap is imported. This function also repeats
    the verification of :func:`attnswap.patch`, unless parameters are on the meta device (offloaded to disk).

    Args:
        path: A directory written by ``save_pretrained`` of a patched model, or a hub name.
        auto_class: The ``transformers`` class to load with.
        **kwargs: Passed on to its ``from_pretrained``.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: The checkpoint has no swap, is incomplete or unreadable, or has a newer format.
        UnsupportedModelError: attnswap cannot compute its attention correctly.
    """
    _require_spec(path, kwargs)
    try:
        model = auto_class.from_pretrained(path, **kwargs)  # which checks that it is whole
    except AttnSwapError:
        raise
    except Exception as error:  # transformers and torch raise many types for a damaged config or other shapes
        raise CheckpointError(f'the checkpoint "{path}" cannot be read: {error}. Is it complete?') from error
    for stack, spec in patched_stacks(model) if not any(p.is_meta for p in model.parameters()) else ():
        verify(stack, spec.before)
    return model


def _require_spec(path: str | Path, kwargs: dict[str, Any]) -> None:
    hub = {k: kwargs[k] for k in HUB if k in kwargs}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        owner = config if hasattr(config, KEY) else config.get_text_config()
    except AttnSwapError:
        raise
    except Exception as error:
        raise CheckpointError(f'no readable config in "{path}": {error}') from error
    if not isinstance(getattr(owner, KEY, None), dict):
        raise CheckpointError(
            f'"{path}" is not a patched checkpoint; load it with transformers and call attnswap.patch'
        )
