"""Tiny random models of every tested architecture."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

ARCHITECTURES = ["llama", "mistral", "qwen3", "gemma2", "gpt_oss", "gpt2", "gpt_neox"]
SWAPS = ["entmax", "forgetting-gate", "selective-temperature", "sigmoid", "softmax-1", "softpick", "ssmax"]
"""One or more for each way through the surgery; tests/surgery/test_stages.py patches all others."""
VOCABULARY = 97
WINDOW = 6


def tiny_config(kind: str, layers: int = 2) -> PreTrainedConfig:
    """A two-layer config of an architecture; sliding windows are ``WINDOW`` long."""
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        return GPT2Config(n_embd=32, n_layer=layers, n_head=4, n_positions=128, **tokens)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        **tokens,
    }
    if kind == "gpt_neox":
        return GPTNeoXConfig(**shape)
    shape |= {"num_key_value_heads": 2, "head_dim": 8}
    if kind == "llama":
        return LlamaConfig(**shape)
    if kind == "mistral":
        return MistralConfig(sliding_window=WINDOW, **shape)
    if kind == "qwen3":
        return Qwen3Config(**shape)
    if kind == "gemma2":
        return Gemma2Config(sliding_window=WINDOW, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, **shape)
    if kind == "gpt_oss":
        return GptOssConfig(num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW, **shape)
    raise ValueError(kind)


def tiny(kind: str = "llama", layers: int = 2, seed: int = 0) -> PreTrainedModel:
    """A random model of an architecture whose attention is far from uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, layers)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.data.normal_(0, 1)
    return model


def write_gguf(path: Path) -> None:
    """Writes a tiny Llama as a GGUF file, quantized where the rows of a weight can be."""
    import gguf

    model = tiny("llama")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    quantized = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        values, kind = tensor.numpy(), None
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            values, kind = gguf.quants.quantize(values, quantized), quantized
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
