"""What is read into an adapter is what its config names, by every route, and what is refused leaves no trace."""

import copy
import json

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import attnswap
from attnswap import AttnSwapConfig
from attnswap.errors import CheckpointError, ConfigError
from attnswap.surgery.patched import spec_of
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import tiny

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folders of a base and of an adapter, away from its start."""
    folder = tmp_path_factory.mktemp("saved")
    tiny("llama").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, AttnSwapConfig(swap="ssmax", layers=[0, 1], **LORA))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    move_away(base, 20)
    model.save_pretrained(folder / "adapter")
    return folder


def base_of(saved):
    return AutoModelForCausalLM.from_pretrained(saved / "base").eval()


def by_peft(base, path, **options):
    return PeftModel.from_pretrained(base, path, **options)


def by_peft_beside(base, path):
    model = get_peft_model(base, AttnSwapConfig(swap="softpick", **LORA), adapter_name="first")
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model


def by_transformers(base, path):
    base.load_adapter(path)
    return base


def by_transformers_beside(base, path):
    base.add_adapter(AttnSwapConfig(swap="softpick", **LORA), "first")
    base.load_adapter(path, "second")
    return base


def by_hand(base, path):
    inject_adapter_in_model(PeftConfig.from_pretrained(path), base)
    set_peft_model_state_dict(base, load_file(path / "adapter_model.safetensors"))
    return base


def by_hand_in_peft(base, path):
    model = get_peft_model(base, PeftConfig.from_pretrained(path))
    set_peft_model_state_dict(model, load_file(path / "adapter_model.safetensors"))
    return model


ROUTES = {
    "peft": by_peft,
    "peft, low memory": lambda base, path: by_peft(base, path, low_cpu_mem_usage=True),
    "peft, beside another": by_peft_beside,
    "peft, auto": lambda base, path: AutoPeftModelForCausalLM.from_pretrained(path),
    "transformers": by_transformers,
    "transformers, beside another": by_transformers_beside,
    "transformers, auto": lambda base, path: AutoModelForCausalLM.from_pretrained(path),
    "by hand": by_hand,
    "by hand, in peft": by_hand_in_peft,
}


def without(*words):
    """Returns an edit that takes tensors out of a file."""

    def edit(path) -> None:
        file = path / "adapter_model.safetensors"
        kept = {k: v for k, v in load_file(file).items() if not all(word in k for word in words)}
        save_file(kept, file, {"format": "pt"})

    return edit


def config(change):
    """Returns an edit of a saved adapter's config."""

    def edit(path) -> None:
        file = path / "adapter_config.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return edit


DAMAGES = {
    "a low-rank tensor is missing": without("layers.1", "q_proj.lora_A"),
    "all low-rank tensors are missing": without("lora_"),
    "a tensor of the swap is missing": without("layers.0", "scale"),
    "a lambda is missing": without("layers.1", "ramp"),
    "a layer of the swap is missing": without("layers.1", "attnswap"),
    "a layer is not named": config(lambda values: values["spec"]["swaps"][0].update(layers=[0])),
    "modules are not named": config(lambda values: values.update(target_modules=["q_proj"])),
    "the rank is another": config(lambda values: values.update(r=3)),
    "heads are not named": config(lambda values: values["spec"]["swaps"][0].update(heads=[0, 2])),
    "the spec is no mapping": config(lambda values: values.update(spec=[0])),
    "a list of swaps has no heads": config(lambda values: values.update(swap=[{}])),
    "the fingerprint is no mapping": config(lambda values: values.update(fingerprint="llama")),
    "a sample is no number": config(
        lambda values: next(iter(values["fingerprint"]["weights"].values())).insert(0, "x")
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_a_whole_adapter_is_the_same_by_every_route(route, saved, tokens):
    with torch.no_grad():
        right = by_peft(base_of(saved), saved / "adapter")(tokens).logits
        found = ROUTES[route](base_of(saved), saved / "adapter").eval()(tokens).logits
    assert (found - right).abs().max() <= 1e-6
    assert (found - base_of(saved)(tokens).logits).abs().max() > 1e-3


EVERYWHERE = ["a low-rank tensor is missing", "a layer is not named"]
QUICK = ["peft"]
EMPTY = [damage for damage in DAMAGES if "missing" in damage]


@pytest.mark.parametrize(
    ("route", "damage"),
    [
        pytest.param(route, damage, marks=[] if damage in EVERYWHERE or route in QUICK else pytest.mark.slow)
        for route in ROUTES
        for damage in DAMAGES
    ],
)
def test_a_damaged_adapter_is_refused(route, damage, saved, tokens, tmp_path):
    """Neither the base nor its other adapter is another one afterwards."""
    path = tmp_path / "adapter"
    path.mkdir()
    for file in (saved / "adapter").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    DAMAGES[damage](path)
    base = base_of(saved)
    before = copy.deepcopy(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with pytest.raises((CheckpointError, ConfigError), match=r"incomplete|does not name|shape|damaged|its heads"):
        ROUTES[route](base, path)
    if "beside" in route:
        assert list(base.peft_config) == ["first"]
        assert not any(".second." in name for name in base.state_dict())
        assert {slot.swap.name for slots in spec_of(base).layers.values() for slot in slots.values()} == {"softpick"}
    elif route == "by hand":  # what was added by hand stays, and is not computed with
        if damage in EMPTY:
            with torch.no_grad(), pytest.raises(CheckpointError, match="incomplete"):
                base(tokens)
    else:
        assert not hasattr(base, "peft_config") and not base._hf_peft_config_loaded
        assert base.state_dict().keys() == before[0].keys() and spec_of(base) is None
        assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before[0].items())
        assert [p.requires_grad for p in base.parameters()] == before[1]
        with torch.no_grad():
            base.load_adapter(saved / "adapter")
            assert base(tokens).logits.isfinite().all()


@pytest.mark.parametrize("swap", ["ssmax", "softpick"])  # with tensors of its own, and with none
@pytest.mark.parametrize(
    "inject",
    [get_peft_model, lambda base, config: inject_adapter_in_model(config, base)],
    ids=["get_peft_model", "inject_adapter_in_model"],
)
def test_a_saved_config_alone_is_no_adapter(inject, swap, saved, tokens, tmp_path):
    """What was never read is not computed with: not low-rank weights either, whether or not the swap has tensors."""
    get_peft_model(base_of(saved), AttnSwapConfig(swap=swap, **LORA)).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    model = inject(base_of(saved), config)
    with torch.no_grad(), pytest.raises(CheckpointError, match="spec to None"):
        model(tokens)
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
        assert model(tokens).logits.isfinite().all()
    config.spec = None
    assert inject(base_of(saved), config)(tokens).logits.isfinite().all()


def test_low_memory_is_for_loading(saved):
    base = base_of(saved)
    with pytest.raises(ConfigError, match="low_cpu_mem_usage"):
        get_peft_model(base, AttnSwapConfig(swap="ssmax"), low_cpu_mem_usage=True)
    assert spec_of(base) is None


@pytest.mark.parametrize("before", ["fresh", "saved", "loaded"])
@pytest.mark.parametrize(
    ("through", "copied"),
    [
        ("peft", lambda config: config),
        ("transformers", copy.deepcopy),
        pytest.param("peft", copy.deepcopy, marks=pytest.mark.slow),
        pytest.param("transformers", lambda config: copy.copy(copy.deepcopy(config)), marks=pytest.mark.slow),
    ],
    ids=["peft-same config", "transformers-deep copy", "peft-deep copy", "transformers-copy of a copy"],
)
def test_an_adapter_made_with_the_config_of_another_starts_at_its_lambda(
    through, before, copied, saved, tokens, tmp_path
):
    """A reference model for preference training is made so: the config of the policy, then a copy of its weights."""
    options = {"swap": {"softpick": [0, 1], "sigmoid": [2]}, "layers": "0:", "ramp": 0.0, **LORA}
    base = base_of(saved)
    model = get_peft_model(base, AttnSwapConfig(**options)).eval()
    attnswap.set_ramp(base, 0.5, layers=[0])
    attnswap.set_ramp(base, 0.75, layers=[1])
    if before != "fresh":
        model.save_pretrained(tmp_path)
    if before == "loaded":
        base = base_of(saved)
        model = PeftModel.from_pretrained(base, tmp_path).eval()
    config = copied(model.peft_config["default"])
    if through == "peft":
        model.add_adapter("ref", config)
    else:
        inject_adapter_in_model(config, base, "ref")
    assert model.peft_config["ref"] is not model.peft_config["default"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                model.get_parameter(name.replace(".default.", ".ref.")).copy_(parameter)
        policy = model(tokens).logits
        model.set_adapter("ref")
        assert torch.equal(model(tokens).logits, policy)
    lambdas = {name: b.tolist() for name, b in model.named_buffers() if name.endswith("ramp")}
    assert sorted(value for name, value in lambdas.items() if ".ref." in name) == [0.5, 0.5, 0.75, 0.75]
    model.save_pretrained(tmp_path / "both")
    specs = [PeftConfig.from_pretrained(tmp_path / "both" / part).spec for part in ("", "ref")]
    assert specs[0] == specs[1]


def test_a_config_for_several_models_stays_what_it_was(saved, tokens, tmp_path):
    """Neither saving an adapter nor moving its lambda changes what the next one starts as."""
    config = AttnSwapConfig(swap="softpick", ramp=0.25, **LORA)
    written = config.to_dict()
    first = get_peft_model(base_of(saved), config)
    attnswap.set_ramp(first.get_base_model(), 1.0)
    first.save_pretrained(tmp_path)
    assert config.to_dict() == {**written, "base_model_name_or_path": config.base_model_name_or_path}
    for again in (config, first.peft_config["default"]):  # the other model is another base, too
        model = get_peft_model(tiny("llama", seed=1), again)
        assert {float(b) for name, b in model.named_buffers() if name.endswith("ramp")} == {0.25}
        assert model(tokens).logits.isfinite().all()
