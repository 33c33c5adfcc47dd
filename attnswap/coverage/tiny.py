"""Tiny random models of all causal language model types of transformers."""

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
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("hidden_size_global", "backbone_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 48),
    **dict.fromkeys(("dff", "ffn_hidden_size", "dim_ff", "feed_forward_size", "intermediate_size_mlp", "mlp_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_blocks", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "swa_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("dim_head", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "encoder_hash_byte_group_vocab"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size",), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"), WINDOW),
    **dict.fromkeys(("sliding_window_size", "local_attention_window_len"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("o_lora_rank", "hidden_size_per_layer_input", "laurel_rank", "gated_norm_rank"), 8),
    **dict.fromkeys(("rotary_dim",), 4),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("index_n_heads", "o_groups", "n_groups", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_d_state", "mamba_expand", "mamba_d_conv", "mamba_n_groups", "mamba_dt_rank"), 2),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("ssm_state_size",), 8),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("eos_token_id",), 2),
}
"""Small sizes by the names that configs use for them."""

DECODER = {"is_decoder": True}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
INDEXED = {
    "layer_types": ["linear_attention", "indexed_attention"],
    "hc_lowrank": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 16,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 2,
}
LATENT = {"num_key_value_heads": 4}
LATENT_LOCAL = {
    **LATENT,
    "layer_types": ["indexed_attention", "sliding_attention"],
    "sliding_window": WINDOW,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 8,
    "swa_kv_lora_rank": 8,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}

PARTS = {"blt": "global_transformer", "hrm_text": "H_module"}
"""The ``part`` to patch in types with several kinds of attention."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": LOCAL,
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {**LATENT, **HYBRID},
    "bamba": {"attn_layer_indices": [1]},
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": {**DECODER, "attention_type": "original_full"},  # the other kind is replaced while it runs
    "camembert": DECODER,
    "cohere2": LOCAL,
    "cohere2_moe": LOCAL,
    "cohere_compass_text": {
        **LOCAL,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in LOCAL["layer_types"]
        },
    },
    "data2vec-text": DECODER,
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 6},
    },
    "dots1": {**LOCAL, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": LATENT_LOCAL,
        "vision_config": {"mlp_layer_types": ["dense", "dense"], "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": LATENT_LOCAL,
    "electra": DECODER,
    "ernie": DECODER,
    "exaone4": LOCAL,
    "exaone_moe": LOCAL,
    "falcon_h1": {"mamba_d_ssm": 32},
    "flint": LOCAL,
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {"text_config": LOCAL, "vision_config": {"model_type": "siglip_vision_model"}},
    "gemma3_text": LOCAL,
    "gemma3n_text": {**LOCAL, "num_kv_shared_layers": 0},
    "gemma4": {"text_config": {**LOCAL, "global_head_dim": 16}},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "gemma4_text": {**LOCAL, "global_head_dim": 16},
    "gemma4_unified": {
        "text_config": {**LOCAL, "global_head_dim": 16},
        "vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32},
    },
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "gemma4_unified_text": {**LOCAL, "global_head_dim": 16},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "got_ocr2": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {"output_channels": 8, "image_size": 64},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": HYBRID,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"], "rel_extent": 16},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"], "rel_extent": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "kimi_linear": {**LATENT, **HYBRID},
    "kolibri1": LOCAL,
    "laguna": LOCAL,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"]},
    "llama4": {"text_config": {"no_rope_layer_interval": 2}},
    "llama4_text": {"no_rope_layer_interval": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"head_dim": 16},
    "megatron-bert": DECODER,
    "mellum": LOCAL,
    "minicpm3": LATENT,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "ministral": {**LOCAL, "head_dim": 8},
    "modernbert-decoder": {"local_attention": 2 * WINDOW},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "musicgen": {"decoder": {"num_codebooks": 1}},
    "musicgen_melody": {"decoder": {"num_codebooks": 1}},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"], "mamba_head_dim": 16},
    "olmo3": LOCAL,
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
        "vision_config": {"image_size": 56, "crop_size": 56},
    },
    "qwen2": {**LOCAL, "use_sliding_window": True},
    "qwen2_moe": {**LOCAL, "use_sliding_window": True},
    "qwen3": {**LOCAL, "use_sliding_window": True},
    "qwen3_5": {"text_config": HYBRID},
    "qwen3_5_moe": {"text_config": HYBRID},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": {**DECODER, "pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "roformer": DECODER,
    "xlm": {"causal": True},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlnet": {"attn_type": "uni"},
    "xmod": {**DECODER, "default_language": "en_XX"},
    "youtu": LATENT,
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "use_mamba_kernels": False,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": WINDOW},
}
"""Config values that single types need in addition to :data:`SIZES`."""


def model_types() -> list[str]:
    """Returns all types with a causal language model, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Returns the config of a tiny model of a type; sliding windows are :data:`WINDOW` tokens long."""
    return _small(CONFIG_MAPPING[model_type], OVERRIDES.get(model_type, {}))


def _small(kind: type[PreTrainedConfig], extra: Mapping[str, Any]) -> PreTrainedConfig:
    known = {f.name: f.default for f in fields(kind)}
    sizes = {n: _like(known[n], size) for n, size in SIZES.items() if n in known and known[n] is not None}
    parts = {}
    for name, part in kind.sub_configs.items():
        own = dict(extra.get(name, {}))
        part = CONFIG_MAPPING[own.pop("model_type")] if "model_type" in own else part  # where any type would do
        if hasattr(part, "model_type"):
            parts[name] = _small(part, own)
    return kind(**{**sizes, **extra, **parts})


def _like(default: Any, size: Any) -> Any:
    """Returns a size in the form of a default value: as a list if the default is one."""
    if default is MISSING or not isinstance(default, list | tuple):
        return size
    return type(default)([size] * min(len(default), LAYERS))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """Returns a tiny random model of a type. Its weights are so large that its attention is far from uniform.

    Raises:
        Exception: Any error that the model's code raises for such a config.
    """
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    part = next((name for name, part in config.sub_configs.items() if part is kind.config_class), None)
    model: PreTrainedModel = kind(config if part is None else getattr(config, part)).eval()
    _randomise(model)
    return model


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 0.25)
        elif "sink" in name:
            parameter.normal_(0, 1)
