"""Ways in which a patched model might compute softmax, or wrong attention, unnoticed: each works or raises."""

import copy
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

import attnswap
from attnswap.errors import AttnSwapError, CheckpointError, UnsupportedModelError
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import tiny

SWAPS = ["forgetting-gate", "ssmax", "softpick"]


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("swap", SWAPS)
def test_config_entries_that_are_removed(swap, patched, tokens):
    model = patched("llama", swap)
    del model.config.attnswap
    with pytest.raises(CheckpointError, match="lost its attnswap entry"):
        logits(model, tokens)


@pytest.mark.parametrize("swap", SWAPS)
def test_a_config_that_is_replaced_is_not_saved(swap, patched, tokens, tmp_path):
    model = patched("llama", swap)
    model.config = tiny().config
    with pytest.raises(CheckpointError, match="attnswap entry"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["own", {"": "own"}])
def test_an_implementation_of_somebody_else_chosen_after_patching(name, patched, tokens, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "own", sdpa_attention_forward)
    model = patched("llama", "softpick")
    model.set_attn_implementation(name)
    with pytest.raises(UnsupportedModelError, match="without attnswap"):
        logits(model, tokens)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("swap", SWAPS)
def test_casts(swap, dtype, patched, tokens):
    model = patched("llama", swap)
    right, cast = logits(model, tokens), copy.deepcopy(model).to(dtype)
    gap = (logits(cast, tokens).float() - right).std()
    stock = (logits(tiny(), tokens) - right).std()
    assert gap < 0.2 * stock


@pytest.mark.parametrize("swap", SWAPS)
def test_copies_live_on_their_own(swap, patched, tokens):
    model = patched("llama", swap)
    right, copied = logits(model, tokens), copy.deepcopy(model)
    attnswap.unpatch(model)
    assert torch.equal(logits(copied, tokens), right)
    assert torch.equal(logits(model, tokens), logits(tiny(), tokens))
    move_away(copied, 20, seed=9)
    if swap != "softpick":
        assert not torch.equal(logits(copied, tokens), right)


@pytest.mark.parametrize("swap", SWAPS)
def test_layers_that_share_one_attention_module(swap, tokens):
    model = tiny()
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    stock = logits(model, tokens)
    attnswap.patch(model, swap)
    move_away(model, 20)
    moved = logits(model, tokens)
    assert not torch.allclose(moved, stock, atol=1e-2)
    attnswap.unpatch(model)
    assert torch.equal(logits(model, tokens), stock)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_device_maps_and_disk_offload(swap, where, patched, tokens, tmp_path):
    model = patched("llama", swap)
    right = logits(model, tokens)
    model.save_pretrained(tmp_path / "model")
    devices = (
        {"": "cpu"} if where == "cpu" else {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    )
    if where == "disk":
        devices |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    options = {"device_map": devices, "offload_folder": tmp_path / "offload"}
    for load in (AutoModelForCausalLM.from_pretrained, attnswap.from_pretrained):
        again = load(tmp_path / "model", **options)
        assert torch.allclose(logits(again, tokens), right, atol=1e-4)  # tensors on disk lie elsewhere: other sums


def test_two_models_in_two_threads(patched, tokens):
    models = [patched("llama", "softpick"), patched("llama", "forgetting-gate"), tiny()]
    right = [logits(model, tokens) for model in models]
    wrong: list[int] = []

    def work(i):
        for _ in range(20):
            if not torch.equal(logits(models[i], tokens), right[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("swap", SWAPS)
def test_resized_embeddings(swap, patched, tokens, tmp_path):
    model = patched("llama", swap)
    right = logits(model, tokens)
    model.resize_token_embeddings(128)
    assert torch.allclose(logits(model, tokens)[..., : right.shape[-1]], right, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("swap", SWAPS)
def test_patching_and_unpatching_a_compiled_model(swap, tokens):
    model = tiny()
    stock = logits(model, tokens)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled, tokens), stock, atol=1e-5)
    attnswap.patch(model, swap)
    move_away(model, 20)
    right = logits(model, tokens)
    assert torch.allclose(logits(compiled, tokens), right, atol=1e-4)
    attnswap.unpatch(model)
    assert torch.allclose(logits(compiled, tokens), stock, atol=1e-5)


@pytest.mark.parametrize("swap", SWAPS)
def test_stock_weights_loaded_into_a_patched_model(swap, patched, tokens):
    model = patched("llama", swap)
    right = logits(model, tokens)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(tiny().state_dict())
    model.load_state_dict(tiny().state_dict(), strict=False)
    assert torch.equal(logits(model, tokens), right)


@pytest.mark.parametrize("swap", SWAPS)
def test_a_layer_used_on_its_own_keeps_its_swap(swap, patched, tokens):
    model = patched("llama", swap)
    hidden = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(9)[None]
    around = model.model.rotary_emb(hidden, places)
    alone = model.model.layers[0](hidden, position_embeddings=around, attention_mask=None, position_ids=places)
    stock = tiny().model.layers[0]
    plain = stock(hidden, position_embeddings=around, attention_mask=None, position_ids=places)
    assert not torch.allclose(alone, plain, atol=1e-3)


def test_parts_of_a_patched_model_moved_to_another_raise(patched, tokens):
    model, other = patched("llama", "softpick"), tiny(seed=3)
    other.model.layers[0].self_attn = model.model.layers[0].self_attn
    hidden = logits(other, tokens)  # the module brings its own config along, and with it its swap
    attnswap.unpatch(model)
    assert not torch.allclose(logits(other, tokens), hidden, atol=1e-3)


@pytest.mark.parametrize("swap", SWAPS)
def test_continuous_batching_is_refused(swap, patched, tokens):
    model = patched("llama", swap)
    with pytest.raises((AttnSwapError, ValueError)):
        model.generate_batch(tokens.tolist(), max_new_tokens=2)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("swap", SWAPS)
def test_exported_programs(swap, patched, tokens):
    model = patched("llama", swap)
    program = torch.export.export(model, (tokens,), {"use_cache": False}, strict=False)
    assert torch.allclose(program.module()(tokens, use_cache=False).logits, logits(model, tokens), atol=1e-4)


class Logits(torch.nn.Module):
    """A model that takes tokens and gives logits, as ONNX wants it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens, use_cache=False).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.thinned(5)
@pytest.mark.parametrize("swap", ["softpick", "forgetting-gate", "ssmax", "sigmoid", "selective-temperature"])
def test_onnx(swap, patched, tokens, tmp_path):
    """What is exported computes the swap, by plain operations."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model = patched("llama", swap)
    file = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (tokens,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    assert torch.allclose(torch.tensor(found), logits(model, tokens), atol=1e-4)
    assert not torch.allclose(torch.tensor(found), logits(tiny("llama"), tokens), atol=1e-2)


@pytest.mark.slow
def test_onnx_refuses_what_it_has_no_form_for(patched, tokens):
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="convert"):
        torch.onnx.export(Logits(patched("llama", "entmax")), (tokens,), dynamo=True, verbose=False)
