"""Each model type passes every check of the coverage table, or is refused with a reason."""

import pytest

from attnswap.coverage import SWAPS, cover, model_types

OWN = [
    "bloom",
    "falcon",
    "mpt",
    "gptj",
    "codegen",
    "gpt_neo",
    "gpt_neox_japanese",
    "openai-gpt",
    "xglm",
    "xlm",
    "roformer",
]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", ["forgetting-gate", "softpick", "selective-temperature", "entmax"])
@pytest.mark.parametrize("kind", OWN)
def test_models_that_compute_attention_themselves(kind, swap):
    row = cover(kind, swap)
    if (kind, swap) == ("mpt", "softpick"):  # its ALiBi counts back from the last key of the input
        assert "depends on the length of the input" in row.reason
    else:
        assert row.passes, row


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "qwen3_moe", "gemma3_text", "deepseek_v3", "gpt2", "jamba", "opt", "phi3"),
        "diffllama",  # makes some parameters of its attention on the CPU even where a checkpoint is being loaded
        "zamba2",  # numbers a layer -1
    ],
)
def test_models_of_the_attention_interface(kind):
    row = cover(kind, "forgetting-gate")
    assert row.passes, row


@pytest.mark.slow
@pytest.mark.parametrize("swap", SWAPS)
def test_no_type_is_wrong(swap):
    """Every type passes, or is refused, or cannot be built here: none is patched and wrong."""
    rows = [cover(kind, swap) for kind in model_types()]
    assert not [row for row in rows if row.reason is None and not row.passes and "Unsupported" not in str(row.columns)]
    assert sum(row.passes for row in rows) >= 168


def test_what_a_model_lacks_is_said_before_what_a_swap_lacks():
    reason = cover("prophetnet", "forgetting-gate").reason
    assert "more than one softmax" in str(reason), reason
