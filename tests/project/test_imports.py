"""``import attnswap`` imports neither torch nor transformers, and what it adds to them is in place in every order."""

import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from torch import Tensor
from transformers import LlamaForCausalLM

import attnswap
from attnswap import imports
from attnswap.bench import SHAPES
from attnswap.cli import stub
from attnswap.cli.bench import SHAPES_HELP
from attnswap.cli.coverage import coverage_command
from attnswap.coverage import SWAPS
from attnswap.imports import after_import
from tests.helpers.tiny_models import tiny


def python(code: str, *arguments: object) -> str:
    """Runs a program in a new process, in which a warning is an error for attnswap, and returns what it prints."""
    command = [sys.executable, "-W", "error:::attnswap", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> Path:
    """A folder with a patched checkpoint, an adapter and its base, and the patched model as a pickle.

    ``expected.pt`` holds tokens and the logits of the patched model, which are not those of the original.
    """
    from peft import get_peft_model

    folder = tmp_path_factory.mktemp("saved")
    tiny("llama").save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    attnswap.patch(model, "softpick")
    model.save_pretrained(folder / "patched")
    torch.save(model, folder / "pickled.pt")
    with torch.no_grad():
        torch.save((tokens, model(tokens).logits), folder / "expected.pt")
    adapted = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder / "base"), attnswap.AttnSwapConfig(swap="softpick")
    )
    adapted.save_pretrained(folder / "adapter")
    return folder


SERVED = """
import sys, threading
from pathlib import Path
folder = Path(sys.argv[1])

def served(model):
    import torch
    ids, expected = torch.load(folder / "expected.pt")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
"""

ATTNSWAP_FIRST = """
import os
import attnswap
assert not {"torch", "transformers", "peft"} & set(sys.modules)
if child := os.fork():  # a forked process is as ready as this one
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.from_pretrained(folder / "patched")
assert config.architectures == ["LlamaForCausalLM"]
assert config.to_dict()["architectures"] == ["AttnSwapLlamaForCausalLM"]
assert "torch" in sys.modules and "transformers.modeling_utils" not in sys.modules
served(AutoModelForCausalLM.from_pretrained(folder / "patched"))
from peft import PeftModel
served(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter"))
os._exit(0)
"""

MODEL_FIRST = """
import attnswap
import torch
from transformers import AutoConfig, LlamaForCausalLM
with torch.device("meta"):  # the rest of attnswap is imported here
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder / "patched"))
from safetensors.torch import load_file
model.to_empty(device="cpu")
model.model.rotary_emb.__init__(model.config)
assert not model.load_state_dict(load_file(folder / "patched" / "model.safetensors"), strict=False).unexpected_keys
model.tie_weights()
served(model.eval())
"""

TRANSFORMERS_FIRST = """
import peft
from transformers import LlamaForCausalLM
import attnswap
served(LlamaForCausalLM.from_pretrained(folder / "patched"))
served(peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter"))
"""

ANOTHER_THREAD = """
import time
thread = threading.Thread(target=lambda: __import__("transformers.modeling_utils"))
thread.start()
while "transformers.modeling_utils" not in sys.modules:
    time.sleep(0.001)
assert sys.modules["transformers.modeling_utils"].__spec__._initializing
import attnswap
from transformers import LlamaForCausalLM
served(LlamaForCausalLM.from_pretrained(folder / "patched"))
thread.join()
"""

PARTS_FIRST = """
from attnswap.adapters.config import AttnSwapConfig  # peft registers what is being imported
import attnswap, peft, torch
from transformers import LlamaForCausalLM
served(peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "adapter"))
assert callable(attnswap.attention) and attnswap.attention.__name__ == "attention"
"""

UNPICKLED = """
import torch
from transformers import LlamaForCausalLM
served(torch.load(folder / "pickled.pt", weights_only=False))
served(LlamaForCausalLM.from_pretrained(folder / "patched"))
"""


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(ATTNSWAP_FIRST, id="attnswap-first"),
        pytest.param(MODEL_FIRST, id="model-first", marks=pytest.mark.slow),
        pytest.param(PARTS_FIRST, id="parts-first", marks=pytest.mark.slow),
        pytest.param(TRANSFORMERS_FIRST, id="transformers-first", marks=pytest.mark.slow),
        pytest.param(ANOTHER_THREAD, id="another-thread", marks=pytest.mark.slow),
        pytest.param(UNPICKLED, id="unpickled", marks=pytest.mark.slow),
    ],
)
def test_patched_models_are_served_in_every_order_of_imports(saved: Path, order: str) -> None:
    python(SERVED + order, saved)


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [(["--help"], {"torch", "transformers"}), (["list"], {"torch._dynamo", "transformers"})],
    ids=["help", "list"],
)
def test_quick_commands_import_little(arguments: list[str], absent: set[str]) -> None:
    code = (
        "import sys, atexit; from attnswap.cli import main; atexit.register(lambda: print('|', *sys.modules)); main()"
    )
    printed, _, modules = python(code, *arguments).rpartition("|")
    assert "ssmax" in printed or "Usage" in printed
    assert not absent & set(modules.split())


def test_importing_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import attnswap"], capture_output=True, check=True)
    assert done.stdout == done.stderr == b""


def test_defaults_of_commands_are_those_of_the_functions() -> None:
    """They are written out in the commands, which import the functions late."""
    for shape in SHAPES.values():
        assert f"{shape.name} ({shape.heads}, {shape.kv_heads}, {shape.head_dim})" in SHAPES_HELP
    assert inspect.signature(coverage_command).parameters["swaps"].default == ",".join(SWAPS)


def test_public_names() -> None:
    assert {name for name in dir(attnswap) if not hasattr(attnswap, name)} == set()
    assert attnswap.attention is sys.modules["attnswap.attention.functional"].attention
    assert attnswap.swaps.resolve("ssmax") == attnswap.SSMax()
    with pytest.raises(AttributeError, match="nothing"):
        attnswap.nothing  # noqa: B018


def test_the_stub_is_up_to_date() -> None:
    assert stub.PATH.read_text() == stub.stub(), f"{stub.PATH.name} is out of date: run `{stub.COMMAND}`"


SNIPPET = """
import attnswap
from transformers import LlamaForCausalLM

def use(model: LlamaForCausalLM) -> None:
    swap: attnswap.Swap = attnswap.SSMax(form="scale")
    report: attnswap.PatchReport = attnswap.patch(model, swap)
    attnswap.SSMax(frm="scale")
    attnswap.SSMax(form="scal")
    attnswap.SSMaxx()
    attnswap.patch(model, swap, rmp=0.0)
"""


MYPY = """
[mypy]
mypy_path = {}
[mypy-torch.*,transformers.*,peft.*,numpy.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_type_checkers_see_the_swaps(tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(MYPY.format(stub.PATH.parent.parent))
    command = [sys.executable, "-m", "mypy", "snippet.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.findall(r"snippet.py:(\d+): error: .*\[(.*)\]", done.stdout) == [
        ("8", "call-arg"),
        ("9", "arg-type"),
        ("10", "attr-defined"),
        ("11", "call-arg"),
    ], done.stdout


# --- after_import, with small modules ---------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], str]]:
    """Writes modules and returns their names; all is forgotten in the end."""
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(name: str, code: str) -> str:
        (tmp_path / f"{name}.py").write_text(code)
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)
        imports._FINDER.actions.pop(name, None)
    imports._FINDER.waiting = {pair for pair in imports._FINDER.waiting if pair[0] not in names}


def test_an_action_follows_the_import_and_each_reload(module: Any) -> None:
    name, seen = module("seen_later", "value = 1\n"), []
    after_import(name, lambda found: seen.append(found.value))
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader.get_source(name) == "value = 1\n"  # type: ignore[union-attr]
    assert seen == []
    found = importlib.import_module(name)
    assert seen == [1]
    assert type(found.__loader__) is type(found.__spec__.loader) is type(imports.__loader__)
    assert inspect.getsource(found) == "value = 1\n"
    importlib.reload(found)
    assert seen == [1, 1]


def test_an_action_runs_at_once_for_what_is_imported(module: Any) -> None:
    name, seen = module("seen_before", "value = 1"), []
    importlib.import_module(name)
    for _ in range(2):
        after_import(name, seen.append)
        importlib.reload(sys.modules[name])
    assert [found.value for found in seen] == [1] * 4


def test_an_action_waits_for_the_end_of_an_import(module: Any) -> None:
    """A module that is being imported imports what adds the action."""
    code = "from attnswap.imports import after_import; import results; after_import('{}', results.add); value = 1"
    name, other = "seen_halfway", module("seen_afterwards", "")
    sys.modules["results"] = results = ModuleType("results")
    seen = results.add = []  # type: ignore[attr-defined]
    results.add = lambda found: seen.append(found.value)  # type: ignore[attr-defined]
    try:
        importlib.import_module(module(name, code.format(name)))
    finally:
        del sys.modules["results"]
    importlib.import_module(other)
    assert seen == [1]


def test_an_action_waits_for_another_thread(module: Any) -> None:
    name, seen, begun, go = module("seen_elsewhere", "import gate; gate(); value = 1"), [], threading.Event(), None
    go = threading.Event()

    def gate() -> None:
        begun.set()
        go.wait(10)

    sys.modules["gate"] = gate  # type: ignore[assignment]
    try:
        thread = threading.Thread(target=importlib.import_module, args=[name])
        thread.start()
        assert begun.wait(10)
        threading.Timer(0.05, go.set).start()
        after_import(name, lambda found: seen.append(found.value))
        assert seen == [1]
        thread.join()
    finally:
        del sys.modules["gate"]


def test_an_action_is_not_lost_to_another_finder(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is asked first and finds the module itself."""
    name, other, seen = module("found_by_another", "value = 1"), module("any_other", ""), []
    after_import(name, lambda found: seen.append(found.value))
    monkeypatch.setattr(sys, "meta_path", [importlib.machinery.PathFinder, *sys.meta_path])
    importlib.import_module(name)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(Path(sys.modules[name].__file__).parent)  # type: ignore[arg-type]
    importlib.import_module(other)
    assert seen == [1]


def test_a_failed_or_forbidden_import_is_as_before(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModuleType] = []
    name = module("seen_never", "1 / 0")
    after_import(name, seen.append)
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(name)
    monkeypatch.setitem(sys.modules, "forbidden", None)
    after_import("forbidden", seen.append)
    after_import("not_there_at_all", seen.append)
    for absent in ("forbidden", "not_there_at_all"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(absent)
        del imports._FINDER.actions[absent]
    imports._FINDER.waiting -= {("forbidden", seen.append), ("not_there_at_all", seen.append)}
    assert seen == []


def test_transformers_is_read_and_reloaded_as_without_the_finder() -> None:
    assert importlib.util.find_spec("transformers") is not None
    assert "class PreTrainedModel" in inspect.getsource(transformers.modeling_utils)
    assert transformers.modeling_utils.__loader__.name == "transformers.modeling_utils"  # type: ignore[union-attr]


def test_reloaded_classes_are_wrapped_too() -> None:
    """In copies of the modules, since a reload makes new classes of which nobody else knows."""
    for name, cls, method in (
        ("transformers.configuration_utils", "PreTrainedConfig", "to_dict"),
        ("transformers.modeling_utils", "PreTrainedModel", "post_init"),
    ):
        spec = imports._FINDER.find_spec(name, sys.modules["transformers"].__path__)
        assert spec is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)  # type: ignore[union-attr]
        wrapped = getattr(getattr(copy, cls), method)
        assert wrapped._attnswap
        assert not hasattr(wrapped.__wrapped__, "_attnswap")
        assert copy.__loader__ is spec.loader  # transformers' own
