"""lambda has one home, its buffer: whoever writes it, the buffer's value is computed, or the next forward raises."""

import copy
import json
import warnings

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

import attnswap
from attnswap.errors import AttnSwapError, CheckpointError, NumericsError
from attnswap.surgery.patched import spec_of
from attnswap.surgery.ramps import slot_at
from attnswap.surgery.spec import Slot
from tests.helpers.tiny_models import tiny

SWAPS = ["softpick", "entmax", "ssmax"]  # lambda inside the maths, a blend of two outputs, a scaled query


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def ramps(model):
    return [buffer for name, buffer in model.named_buffers() if name.endswith(".ramp")]


def _average(model, target):
    averaged = AveragedModel(model)
    attnswap.set_ramp(model, target)
    averaged.update_parameters(model)
    return averaged.module


def _mean(model, target):
    """A mean over buffers too, of a copy at lambda t + 0.1 and the model at t - 0.1."""
    attnswap.set_ramp(model, max(0.0, target - 0.1))
    averaged = AveragedModel(copy.deepcopy(model), use_buffers=True)
    averaged.update_parameters(model)
    attnswap.set_ramp(model, min(1.0, target + 0.1))
    averaged.update_parameters(model)
    return averaged.module


def _in_place(write):
    def written(model, target):
        with torch.no_grad():
            for buffer in ramps(model):
                write(buffer, target)
        return model

    return written


def _inference(model, target):
    with torch.inference_mode():
        for module in model.modules():
            if "ramp" in module._buffers:
                module._buffers["ramp"] = torch.tensor(target)
    return model


def _state(model, target):
    other = copy.deepcopy(model)
    attnswap.set_ramp(other, target)
    model.load_state_dict(other.state_dict())
    return model


def _assigned(model, target):
    state = {name: x.clone() for name, x in model.state_dict().items()}
    model.load_state_dict(state | {n: torch.tensor(target) for n in state if n.endswith(".ramp")}, assign=True)
    return model


def _dispatched(model, target):
    model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    return _in_place(lambda buffer, value: buffer.fill_(value))(model, target)


WRITERS = {
    "set_ramp": lambda model, target: attnswap.set_ramp(model, target) or model,
    "fill_": _in_place(lambda buffer, value: buffer.fill_(value)),
    "data.fill_": _in_place(lambda buffer, value: buffer.data.fill_(value)),
    "data =": _in_place(lambda buffer, value: setattr(buffer, "data", torch.tensor(value))),
    "inference tensors": _inference,
    "averaged model": _average,
    "mean of buffers": _mean,
    "load_state_dict": _state,
    "load_state_dict, assigned": _assigned,
    "dispatched": _dispatched,
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("target", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_the_buffer_says_is_computed(writer, swap, start, target, tokens, tmp_path):
    config = attnswap.SSMax(form="scale", init="paper") if swap == "ssmax" else swap
    model, right = tiny(), tiny()
    attnswap.patch(model, config, ramp=start)
    logits(model, tokens)
    written = WRITERS[writer](model, target)
    held = sum(float(buffer) for buffer in ramps(written)) / 2
    assert writer == "mean of buffers" or held == target
    attnswap.patch(right, config, ramp=held)
    assert torch.allclose(logits(written, tokens), logits(right, tokens), atol=1e-6)
    assert [slot.ramp for slots in spec_of(written).layers.values() for slot in slots.values()] == pytest.approx(
        [held, held]
    )


@pytest.mark.parametrize("writer", ["data.fill_", "averaged model", "load_state_dict"])
@pytest.mark.parametrize("swap", SWAPS)
def test_what_the_buffer_says_is_saved(writer, swap, tokens, tmp_path):
    model = tiny()
    attnswap.patch(model, swap, ramp=0.0)
    written = WRITERS[writer](model, 1.0)
    written.save_pretrained(tmp_path)
    again = attnswap.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(written, tokens))
    assert str(attnswap.describe(again)) == str(attnswap.describe(written))


@pytest.mark.parametrize("value", [2.0, -0.1, float("nan")])
def test_a_buffer_outside_its_range_raises(value, tokens):
    """At the next forward and when it is saved; the way out that the error names is one."""
    model = tiny()
    attnswap.patch(model, "softpick")
    right = logits(model, tokens)
    WRITERS["data.fill_"](model, value)
    with pytest.raises(NumericsError, match=r"not in \[0, 1\].*set_ramp"):
        logits(model, tokens)
    attnswap.set_ramp(model, 1.0)
    assert torch.equal(logits(model, tokens), right)
    WRITERS["data.fill_"](model, value)
    attnswap.unpatch(model)
    assert torch.equal(logits(model, tokens), logits(tiny(), tokens))


@pytest.mark.parametrize(
    "buffer",
    [torch.ones(1), torch.ones(3), torch.ones(2, 2), torch.ones(1, 4), torch.ones(4).long(), torch.tensor(False)],
)
def test_a_buffer_of_another_form_raises(buffer, tokens):
    model = tiny()
    attnswap.patch(model, "softpick")
    model.model.layers[1].self_attn.attnswap.softpick._buffers["ramp"] = buffer
    with pytest.raises(NumericsError, match="shape"):
        logits(model, tokens)
    attnswap.set_ramp(model, 1.0)
    right = tiny()
    attnswap.patch(right, "softpick")
    assert torch.equal(logits(model, tokens), logits(right, tokens))


def test_heads_that_share_a_value_are_not_written_apart(tokens):
    model = tiny()
    attnswap.patch(model, "selective-temperature")
    attnswap.set_ramp(model, [0.5] * 4)
    ramps(model)[0].data[1] = 0.25
    with pytest.raises(NumericsError, match="key/value head"):
        logits(model, tokens)


def test_a_moved_lambda_of_the_base_is_mentioned_when_a_plain_adapter_is_saved(tmp_path):
    model = tiny()
    attnswap.patch(model, "softpick", ramp=0.5)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(attnswap.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        adapted.save_pretrained(tmp_path / "as it was")
    attnswap.set_ramp(adapted.get_base_model(), 1.0)
    with pytest.warns(UserWarning, match="lambda of this model's swaps differs"):
        adapted.save_pretrained(tmp_path / "moved")


def test_one_head_of_many_is_written(tokens):
    model, right = tiny(), tiny()
    for one in (model, right):
        attnswap.patch(one, "softpick")
        attnswap.set_ramp(one, [1.0] * 4)
    ramps(model)[1].data[2] = 0.0
    attnswap.set_ramp(right, {1: [1.0, 1.0, 0.0, 1.0]})
    assert torch.equal(logits(model, tokens), logits(right, tokens))
    assert spec_of(model) == spec_of(right)


def test_set_ramp_writes_the_buffer_that_others_hold():
    model = tiny()
    attnswap.patch(model, "softpick", ramp=0.0)
    held = ramps(model)
    attnswap.set_ramp(model, 0.25)
    assert all(one is other for one, other in zip(held, ramps(model), strict=True))
    assert [float(buffer) for buffer in held] == [0.25, 0.25]


@pytest.mark.parametrize("start", [0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_compiled_graph_notices_another_phase(start, tokens):
    model = tiny()
    attnswap.patch(model, "softpick", ramp=start)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens, use_cache=False).logits, logits(model, tokens), atol=1e-5)
        WRITERS["data.fill_"](model, 1.0 - start)
        with pytest.raises(RuntimeError, match="buffer of lambda"):
            compiled(tokens, use_cache=False)
        right = logits(model, tokens)  # reads the buffer
        assert torch.allclose(compiled(tokens, use_cache=False).logits, right, atol=1e-5)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_where_there_is_no_number_the_last_one_counts(kind):
    slot = Slot(attnswap.Softpick(), ramp=0.5)
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        empty = torch.empty(())
    assert slot_at(slot, empty) is slot


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_vmap_over_models_reads_every_lambda(value, tokens):
    """Stacked models, as for ensembles: buffers are batched."""
    models = [tiny(seed=seed) for seed in (0, 1)]
    for model in models:
        attnswap.patch(model, "softpick", ramp=0.25)
        attnswap.set_ramp(model, value)
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0])
    attnswap.set_ramp(base, 0.25)

    def run(parameters, buffers):
        return torch.func.functional_call(
            base, (parameters, buffers), (tokens,), {"use_cache": False, "attention_mask": torch.ones_like(tokens)}
        ).logits

    try:
        found = torch.func.vmap(run)(parameters, buffers)
    except (AttnSwapError, RuntimeError):  # parts of transformers and of kernels have no batched form
        return
    for one, model in zip(found, models, strict=True):
        assert torch.allclose(one, logits(model, tokens), atol=1e-5)


def test_a_config_on_meta_is_initialised_whole():
    """Every tensor, lambda among them, by ``init_weights``."""
    model = tiny()
    attnswap.patch(model, {"name": "sigmoid", "bias": "predicted", "units": 4}, ramp=0.25)
    with torch.device("meta"):
        fresh = type(model)(model.config)
    fresh.to_empty(device="cpu")
    for tensor in (*fresh.parameters(), *fresh.buffers()):
        tensor.data.fill_(7)
    fresh.init_weights()
    assert [float(buffer) for buffer in ramps(fresh)] == [0.25, 0.25]
    assert all(7 not in tensor for tensor in attnswap.swap_parameters(fresh).values())


def test_config_json_and_weights_that_differ_are_refused(tmp_path):
    model = tiny()
    attnswap.patch(model, "softpick", ramp=0.5)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["attnswap"]["swaps"][0]["ramp"] = 1.0
    (tmp_path / "config.json").write_text(json.dumps(values))
    for load in (attnswap.from_pretrained, type(model).from_pretrained):
        with pytest.raises(CheckpointError, match="lambda"):
            load(tmp_path)
