"""Arguments of a forward: what cannot change attention passes, what can is honoured, all else is refused by name."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.big_modeling import _attach_context_parallel_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.placement_types import Shard
from transformers import DataCollatorWithFlattening, WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attnswap
from attnswap.errors import UnsupportedModelError
from attnswap.surgery import arguments
from attnswap.surgery.seam import gate_hook_of
from attnswap.surgery.stacks import find_stack
from tests.helpers.tiny_models import tiny

SWAPS = ["softpick", "ssmax", "forgetting-gate"]


def test_every_documented_argument_is_known():
    """Of the installed transformers: a newer one may document more, which are refused until somebody looks at them."""
    assert arguments.documented() <= arguments.KNOWN


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("extra", ["shift_labels", "ignore_index", "num_items_in_batch", "seq_idx", "all"])
def test_arguments_of_the_loss(extra, swap, layers, tokens):
    model = tiny()
    attnswap.patch(model, swap, layers=layers)
    given = {
        "shift_labels": torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=5 if extra == "all" else -100),
        "ignore_index": 5,
        "num_items_in_batch": torch.tensor(7),
        "seq_idx": torch.zeros_like(tokens, dtype=torch.int32),
    }
    given = given if extra == "all" else {extra: given[extra]}
    logits = model(tokens, use_cache=False).logits
    found = model(tokens, labels=tokens, use_cache=False, **given)
    assert torch.equal(found.logits, logits)
    loss = {name: value for name, value in given.items() if name != "seq_idx"}
    right = model.loss_function(logits=logits, labels=tokens, vocab_size=97, **loss)
    assert torch.equal(found.loss, right)


def test_another_argument_is_refused_by_name(tokens):
    model = tiny()
    attnswap.patch(model, "softpick")
    with pytest.raises(UnsupportedModelError, match='passes "block_size"'):
        model(tokens, block_size=4)
    model(tokens, block_size=None)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("layers", [None, [1]])
def test_packing_as_collators_do_it(swap, layers, tokens):
    """Every argument that transformers' collator can make, with and without positions."""
    model = tiny()
    attnswap.patch(model, swap, layers=layers)
    documents = [tokens[0, :8], tokens[1, :5], tokens[1, 5:]]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": document.tolist()} for document in documents])
    del batch["labels"]
    alone = torch.cat([model(document[None], use_cache=False).logits for document in documents], 1)
    assert torch.allclose(model(**batch, use_cache=False).logits, alone, atol=1e-5)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("swap", SWAPS)
def test_another_implementation_is_taken_up(swap, layers, name, tokens, tmp_path):
    """The swap stays; what is not swapped runs on it, and unpatching leaves the model with it."""
    model = tiny()
    attnswap.patch(model, swap, layers=layers)
    with torch.no_grad():
        right = model(tokens, use_cache=False).logits
        model.set_attn_implementation(name)
        for _ in range(2):
            assert torch.allclose(model(tokens, use_cache=False).logits, right, atol=1e-5)
    assert {gate_hook_of(module).route.before for _, module in find_stack(model).modules.values()} == {name}
    model.save_pretrained(tmp_path)
    assert attnswap.describe(attnswap.from_pretrained(tmp_path)).before == name
    attnswap.unpatch(model)
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention"])
def test_an_implementation_whose_masks_say_less_is_not_taken_up_on_the_way(name, tokens):
    """Masks are made before the first layer runs: a flash function's know neither windows nor packing."""
    model = tiny("mistral")
    attnswap.patch(model, "sigmoid")
    model.config._attn_implementation_internal = name
    refused = pytest.raises((UnsupportedModelError, ImportError, AttributeError))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), refused:  # flex attention compiles for long
        model(tokens, use_cache=False)
    model.config._attn_implementation_internal = "attnswap"
    model(tokens, use_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"heads": [0, 1]}, {}, {"layers": [1]}, {"ramp": 0.5}],
)
def test_layers_compiled_one_by_one(options, tokens):
    """In place or wrapped, before or after patching, each a whole graph."""
    right = tiny()
    attnswap.patch(right, "ssmax", **options)
    right = right(tokens, use_cache=False).logits
    for first in (True, False):
        for wrapped in (True, False):
            torch.compiler.reset()
            model = tiny()
            if first:
                attnswap.patch(model, "ssmax", **options)
            for i, layer in enumerate(model.model.layers):
                if wrapped:
                    model.model.layers[i] = torch.compile(layer, backend="eager", fullgraph=True)
                else:
                    layer.compile(backend="eager", fullgraph=True)
            if not first:
                attnswap.patch(model, "ssmax", **options)
            assert torch.allclose(model(tokens, use_cache=False).logits, right, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("part", ["cross", "decoder.layers.*.self_attn", "encoder"])
def test_times_of_tokens(part):
    """Whisper chooses "eager" by itself when it is asked for them."""
    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    config = WhisperConfig(
        vocab_size=200, d_model=32, num_mel_bins=8, max_source_positions=50, max_target_positions=40, **sizes
    )
    config.update({"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3})
    model = WhisperForConditionalGeneration(config).eval()
    settings = model.generation_config
    settings.alignment_heads, settings.no_timestamps_token_id = [[0, 0], [1, 1]], 150
    settings.is_multilingual, settings.median_filter_width = False, 3
    attnswap.patch(model, "softpick", part=part)
    sound = torch.randn(1, 8, 100)
    plain = model.generate(sound, max_new_tokens=6)
    timed = model.generate(sound, max_new_tokens=6, return_token_timestamps=True)
    assert torch.equal(timed["sequences"], plain)
    assert torch.equal(model.generate(sound, max_new_tokens=6), plain)


def _split(rank, port, found):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = tiny()
    attnswap.patch(model, "softpick")
    tokens, places = torch.randint(3, 97, (1, 16)), torch.arange(16)[None].clone()
    said = {}

    def attempt(name):
        try:
            with torch.no_grad():
                model(tokens, position_ids=places, use_cache=False)
            said[name] = "computed"
        except UnsupportedModelError as error:
            said[name] = str(error)

    attempt("plain")
    stock = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def gathering(*args, **kwargs):
        return stock(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = gathering
    attempt("replaced")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = stock
    _attach_context_parallel_hooks(model)
    with context_parallel(mesh, buffers=[tokens, places], buffer_seq_dims=[1, 1]):
        attempt("ring")
    attempt("after")
    module = model.model.layers[0].self_attn
    heads = distribute_tensor(torch.randn(1, 4, 16, 8), mesh, [Shard(2)])
    try:
        attnswap.surgery.split.refuse_split(module, "sdpa", heads)
        said["sharded"] = "computed"
    except UnsupportedModelError as error:
        said["sharded"] = str(error)
    found.put(said)
    dist.destroy_process_group()


def test_split_sequences_are_refused():
    """Under torch's context parallelism, where a library gathers sequences in attention, and sharded by tokens."""
    found = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_split, (29641, found), nprocs=2)
    for _ in range(2):
        said = found.get()
        assert said["plain"] == said["after"] == "computed"
        assert "context parallelism is on" in said["ring"]
        assert "has replaced" in said["replaced"]
        assert "sharded along the tokens" in said["sharded"]
