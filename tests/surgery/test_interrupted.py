"""A patch that fails or is interrupted, wherever it is, leaves the model as it was."""

import copy
import sys
import threading

import pytest
import torch

import attnswap
from attnswap.surgery.patched import spec_of
from tests.helpers.tiny_models import tiny


def state(model):
    """Everything that a patch changes, without the values of tensors."""
    hooks = {
        name: [
            {key: type(hook).__name__ for key, hook in getattr(module, table).items()}
            for table in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks")
        ]
        for name, module in model.named_modules()
    }
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return {
        "hooks": hooks,
        "attributes": attributes,
        "config": id(model.config),
        "values": model.config.to_dict(),
        "implementation": model.config._attn_implementation,
        "spec": spec_of(model),
        "tensors": [(name, id(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()],
        "strict": model._keep_in_fp32_modules_strict,
    }


class Interrupt:
    """Raises at the n-th line that a function of attnswap runs."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame, event, argument):
        if "/attnswap/surgery/" not in frame.f_code.co_filename or frame.f_code.co_filename.endswith("undo.py"):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self

    def run(self, function):
        """Runs a function; returns whether it was interrupted."""
        sys.settrace(self)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False


FIRST = {"none": lambda model: None, "other heads": lambda model: attnswap.patch(model, "ssmax", heads=[0])}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_interrupts_at_any_line(kind, first, tokens):
    """At lines drawn over the whole patch."""
    made = tiny(kind)
    FIRST[first](made)
    counting = Interrupt(at=-1)
    assert not counting.run(lambda: attnswap.patch(copy.deepcopy(made), "softpick", heads=[1, 2]))
    model = tiny(kind)
    FIRST[first](model)
    before = state(model)
    with torch.no_grad():
        right = model(tokens, use_cache=False).logits
        for at in torch.linspace(1, counting.count - 1, 12).int().tolist():
            if not Interrupt(at).run(lambda: attnswap.patch(model, "softpick", heads=[1, 2])):
                attnswap.unpatch(model)  # the last lines of a second run may be fewer
                FIRST[first](model)
                continue
            assert state(model) == before, at
        assert torch.equal(model(tokens, use_cache=False).logits, right)


def test_an_interrupted_unpatch_leaves_the_swap(tokens):
    model = tiny()
    attnswap.patch(model, "softpick")
    before = state(model)
    counting = Interrupt(at=-1)
    counting.run(lambda: attnswap.unpatch(copy.deepcopy(model)))
    for at in torch.linspace(1, counting.count - 2, 6).int().tolist():
        assert Interrupt(at).run(lambda: attnswap.unpatch(model))
        assert state(model) == before


def test_a_second_patch_that_cannot_be_made_says_why():
    model = tiny()
    attnswap.patch(model, "ssmax", heads=[0])
    before = state(model)
    with pytest.raises((RuntimeError, attnswap.ConfigError)):
        attnswap.patch(model, {"name": "sigmoid", "bias": "predicted", "units": 10**13}, heads=[1])
    assert state(model) == before


def test_random_numbers_of_other_threads_are_their_own():
    model, drawn, over = tiny(), [], threading.Event()

    def sample():
        while not over.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=sample)
    thread.start()
    for _ in range(3):
        attnswap.patch(model, "ssmax")
        attnswap.unpatch(model)
    over.set()
    thread.join()
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("swap", ["softpick", "ssmax", "forgetting-gate"])
@pytest.mark.parametrize("inside", ["the patch", "the model too"])
def test_patching_in_inference_mode(swap, inside, tokens):
    right = tiny()
    torch.manual_seed(1)
    attnswap.patch(right, swap)
    model = None if inside == "the model too" else tiny()
    with torch.inference_mode():
        model = model or tiny()
        torch.manual_seed(1)
        attnswap.patch(model, swap)
        found = model(tokens, use_cache=False).logits
    assert torch.allclose(found, right(tokens, use_cache=False).logits, atol=1e-5)


def test_hooks_that_transformers_installs_during_the_proof_stay(tokens):
    model = tiny()
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = True
    attnswap.patch(model, "ssmax")
    assert len(model(tokens, output_attentions=True).attentions) == 2
    attnswap.unpatch(model)
    assert len(model(tokens, output_attentions=True).attentions) == 2
