"""A few tokens, pixels or sounds on which any model runs, and running a model on them."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from attnswap.errors import UnsupportedModelError

TOKENS = 6


def run_tiny(model: PreTrainedModel) -> Tensor:
    """Runs a model on two short inputs.

    Returns:
        Its output in fp32; of tokens, those that are no padding.
    """
    inputs, stand_ins = tiny_inputs(model), _stand_ins(model)
    return real_output((functional_call(model, stand_ins, kwargs=inputs) if stand_ins else model(**inputs))[0])


def _stand_ins(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns stand-ins for tensors that were made in inference mode, through which autograd does not go."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors if tensor.is_inference()}


def real_output(output: Tensor) -> Tensor:
    """Returns outputs in fp32, of tokens those that are no padding."""
    real = real_tokens(output.device)
    return (output[real.bool()] if output.shape[:2] == real.shape else output).float()


def prefix_gap(model: PreTrainedModel) -> float:
    """How far the output at the first tokens moves when another token follows them."""
    inputs = tiny_inputs(model)
    short = {k: x[:1, :-1] if isinstance(x, Tensor) and x.ndim == 2 else x for k, x in inputs.items()}
    long = {k: x[:1] if isinstance(x, Tensor) else x for k, x in inputs.items()}
    before, after = model(**short)[0], model(**long)[0]
    if before.ndim != 3:
        return 0.0
    return float((after[:, :-1] - before).abs().max() / after.std())


def tiny_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Returns two short inputs for a model's forward; of tokens, the second row is left-padded.

    Raises:
        UnsupportedModelError: The model takes something that is unknown here.
    """
    accepted = inspect.signature(model.forward).parameters
    device, dtype = next(model.parameters()).device, model.dtype
    config = model.config
    inputs: dict[str, Any] = {}
    main = model.main_input_name
    if main == "input_ids":
        inputs |= _tokens(model, "input_ids", "attention_mask", device)
    if main == "pixel_values" or ("pixel_values" in accepted and _needs_pixels(model)):
        inputs["pixel_values"] = _pixels(config, device, dtype)
    if main == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = _noise((2, config.num_mel_bins, frames), device, dtype)
    if not inputs:
        raise UnsupportedModelError(
            f'{type(model).__name__} takes "{main}" as its input, for which attnswap knows no trial; it serves models '
            "of tokens, of pixel values and of input features"
        )
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs |= _tokens(model, "decoder_input_ids", "decoder_attention_mask", device)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return {name: value for name, value in inputs.items() if name in accepted or "kwargs" in accepted}


def _tokens(model: PreTrainedModel, ids: str, mask: str, device: torch.device) -> dict[str, Tensor]:
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if not isinstance(vocabulary, int):
        embeddings: Any = model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
    values = (torch.arange(2 * TOKENS, device=device).reshape(2, TOKENS) * 7 + 3) % vocabulary
    return {ids: values, mask: real_tokens(device)}


def real_tokens(device: torch.device) -> Tensor:
    """Returns which tokens are no padding, shape (2, :data:`TOKENS`)."""
    real = torch.ones(2, TOKENS, dtype=torch.long, device=device)
    real[1, :2] = 0
    return real


def _needs_pixels(model: PreTrainedModel) -> bool:
    """Whether a model compares texts with images, so that it cannot run on either alone."""
    config = model.config
    return hasattr(config, "vision_config") and hasattr(config, "projection_dim")


def _pixels(config: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", 32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _noise((2, getattr(config, "num_channels", 3), height, width), device, dtype)


def _noise(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return made.to(device, dtype)
