"""What is not swapped at this moment sees the same keys whatever the cache: a static one moves its counter in place."""

import contextlib
import copy

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from torch.utils._pytree import tree_map
from transformers import (
    CompileConfig,
    DynamicCache,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_prefill_decode
from transformers.masking_utils import create_causal_mask

import attnswap
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import WINDOW, tiny

LENGTH = 20
CUTS = {"by token": [14, *range(15, LENGTH + 1)], "in chunks": [6, 13, LENGTH]}


def _bypassed(model):
    attnswap.patch(model, "softpick")
    return attnswap.bypassed(model)


def _disabled(model):
    config = attnswap.AttnSwapConfig(swap="softpick")
    return get_peft_model(model, config).disable_adapter()


def _patched(swap, **options):
    def patch(model):
        attnswap.patch(model, swap, **options)
        move_away(model, LENGTH)
        return contextlib.nullcontext()

    return patch


STATES = {
    "one layer": _patched("softpick", layers=[1]),
    "one head": _patched("ssmax", heads=[0]),
    "a gate on two heads": _patched("forgetting-gate", heads=[2, 3]),
    "lambda 0": _patched("ssmax", ramp=0.0),
    "lambda 0.5, blended": _patched("entmax", ramp=0.5),
    "lambda 0.5, inside": _patched("softpick", ramp=0.5),
    "bypassed": _bypassed,
    "disabled adapter": _disabled,
}


def caches(model):
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=LENGTH + 4),
    }


@pytest.mark.thinned(2)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_a_cache_changes_nothing(state, kind, cache, cut, tokens):
    model = tiny(kind)
    with STATES[state](model):
        right = model(tokens, use_cache=False).logits
        past, start, parts = caches(model)[cache](), 0, []
        for stop in CUTS[cut]:
            parts.append(model(tokens[:, start:stop], past_key_values=past).logits)
            start = stop
    assert (torch.cat(parts, 1) - right).abs().max() < 1e-4 * right.std()


@pytest.mark.parametrize("part", ["encoder", "decoder.layers.*.self_attn", "cross"])
@torch.no_grad()
def test_the_other_attention_of_an_encoder_decoder(part):
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2) | dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads"), 4
    )
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=3,
            vocab_size=97,
            d_model=32,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=40,
            **sizes,
        )
    ).eval()
    attnswap.patch(model, "softpick", part=part)
    sound, words = torch.randn(1, 8, 40), torch.randint(3, 97, (1, 12))
    right = model(sound, decoder_input_ids=words, use_cache=False).logits
    made = model.generate(
        sound,
        decoder_input_ids=words,
        max_new_tokens=4,
        cache_implementation="static",
        return_dict_in_generate=True,
        output_logits=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    again = model(sound, decoder_input_ids=made.sequences[:, :-1], use_cache=False).logits
    steps = torch.stack(made.logits, 1)
    assert (steps - again[:, -steps.shape[1] :]).abs().max() < 1e-4
    assert (again[:, : right.shape[1]] - right).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("state", ["one layer", "one head", "a gate on two heads", "lambda 0", "lambda 0.5, inside"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@torch.no_grad()
def test_compiled_decoding(state, backend, tokens):
    """The code that Inductor makes, and not only the graph: on an accelerator ``generate`` compiles by itself."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW + 20,
        eos_token_id=None,
    )
    model = MistralForCausalLM(config).eval()
    STATES[state](model)
    how = CompileConfig(backend=backend, fullgraph=True)
    how._compile_all_devices = True
    torch.compiler.reset()
    plain = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    made = model.generate(tokens, cache_implementation="static", compile_config=how, output_logits=True, **plain)
    right = model(made.sequences[:, :-1], use_cache=False).logits[:, LENGTH - 1 :]
    assert (torch.stack(made.logits, 1) - right).abs().max() < 1e-4
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("swap", "step"),
    [("softpick", "decode"), pytest.param("softpick", "prefill", marks=pytest.mark.slow)]
    + [pytest.param(name, "decode", marks=pytest.mark.slow) for name in ("forgetting-gate", "entmax", "ssmax")],
)
def test_exported_steps_of_generate(swap, step, tokens):
    """A static cache and the mask that generate made ahead are inputs of the program, the mask as a tensor."""
    model = tiny()
    attnswap.patch(model, swap)
    move_away(model, LENGTH)
    settings = copy.deepcopy(model.generation_config)
    settings.cache_implementation = "static"
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    module, inputs = decompose_prefill_decode(model, given, settings)[step]
    with torch.no_grad():
        right = module(**copy.deepcopy(inputs)).logits
    program = DynamoExporter().export_program(module, copy.deepcopy(inputs), config=DynamoConfig())
    program = program[0] if isinstance(program, tuple) else program
    inputs = {name: x for name, x in inputs.items() if not isinstance(x, bool)}
    found = program.module()(**inputs | {"attention_mask": inputs["attention_mask"].tensor()})
    assert torch.allclose(found.logits, right, atol=1e-5)


def padded_mask():
    """A patched model's mask of two rows, the second left-padded."""
    model = tiny()
    attnswap.patch(model, "ssmax")
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    return create_causal_mask(
        config=model.config, inputs_embeds=torch.zeros(2, 5, 32), attention_mask=real, past_key_values=None
    )


def test_masks_in_lists():
    """Functions of torch find a patched model's mask wherever it stands among their arguments."""
    mask = padded_mask()
    plain = mask.tensor()
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([plain, plain], -1))
    assert torch.equal(torch.stack((mask, plain)), torch.stack((plain, plain)))
    assert torch.equal(torch.where(mask, plain, ~mask), torch.ones_like(plain))
    assert torch.equal(torch.nn.functional.pad(input=mask, pad=(0, 1)), torch.nn.functional.pad(plain, (0, 1)))


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [(kind, name) for kind in ("llama", "mistral", "gpt2") for name in ("eager", "sdpa")] + [("gemma2", "eager")],
)
@pytest.mark.parametrize("state", STATES)
@torch.no_grad()
def test_masks_that_libraries_move_or_take_apart(state, kind, implementation, tokens):
    """Offloading moves what a layer is given by its method ``to``, and others map a function over it as over a tree."""
    model = tiny(kind)
    model.set_attn_implementation(implementation)
    with STATES[state](model):
        right = model(tokens, use_cache=False).logits
        base = model
        layer = base.transformer.h[1] if kind == "gpt2" else base.model.layers[1]
        for change in (lambda x: x.to(torch.device("cpu")) if hasattr(x, "to") else x, lambda x: x):
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs, change=change: tree_map(change, (args, kwargs)), with_kwargs=True
            )
            assert torch.allclose(model(tokens, use_cache=False).logits, right, atol=1e-5)
            handle.remove()
        if state != "disabled adapter":
            dispatch_model(model, {"": "cpu"}, force_hooks=True)
            assert torch.allclose(model(tokens, use_cache=False).logits, right, atol=1e-5)


@torch.no_grad()
def test_a_mask_on_another_device_is_the_same_mask():
    mask = padded_mask()
    assert mask.to("cpu") is mask
    moved = mask.to(device="meta", non_blocking=True)
    assert moved.visibility.key_valid.device.type == moved.tensor().device.type == "meta"
    assert moved.for_implementation("eager").shape == mask.for_implementation("eager").shape
    assert torch.equal(mask.to(torch.float32), mask.tensor().float())
