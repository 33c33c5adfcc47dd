"""Tiny random models of every type that transformers knows."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 99
LAYERS = 2
WINDOW = 6

SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("dff", "ffn_hidden_size", "dim_ff", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "decoder_max_position_embeddings"), 64
    ),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("rotary_dim", "index_head_dim"), 4),
    **dict.fromkeys(("mamba_d_state", "mamba_expand", "mamba_d_conv", "mamba_n_groups", "mamba_dt_rank"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id",), 2),
}
"""Small values for the names under which configs keep their sizes."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
}
"""What single types need beside :data:`SIZES`."""


def model_types() -> list[str]:
    """Returns every type that has a causal language model, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Returns the config of a tiny model of a type; sliding windows are :data:`WINDOW` tokens long."""
    return _small(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def _small(kind: type[PreTrainedConfig], extra: Mapping[str, Any]) -> PreTrainedConfig:
    known = {f.name: f.default for f in fields(kind)}
    sizes = {n: _like(known[n], size) for n, size in SIZES.items() if n in known and known[n] is not None}
    parts = {
        name: _small(part, extra.get(name, {}))
        for name, part in getattr(kind, "sub_configs", {}).items()
        if isinstance(part, type) and hasattr(part, "model_type")
    }
    own = {k: v for k, v in extra.items() if k not in parts}
    return kind(**{**sizes, **parts, **own})


def _like(default: Any, size: Any) -> Any:
    """Returns a small value in place of a default; a single number in place of a list of them becomes a list."""
    if default is MISSING or not isinstance(default, list | tuple):
        return size
    return type(default)([size] * min(len(default), LAYERS))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Returns a tiny random model of a type whose attention is far from uniform.

    Raises:
        Exception: Whatever its code raises for such a config.
    """
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = kind(config).eval()
    _stir(model)
    return model


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.25)
        elif "sink" in name:
            parameter.normal_(0, 1)
