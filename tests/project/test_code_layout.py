"""The shape of the package itself."""

import ast
import graphlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import tiny
from transformers import PreTrainedModel

from attnswap.modes import evaluating
from attnswap.surgery.module import LayerSwap
from attnswap.surgery.spec import _taken
from attnswap.swaps import ModelInfo
from attnswap.training.loss import _prove
from attnswap.training.packing import check_separation

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
    for path in ROOT.glob("attnswap/**/*.py")
}


def imports(node: ast.AST) -> Iterator[str]:
    """The package's modules that one of them imports, in functions too, but for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            named = {alias.name: f"{child.module}.{alias.name}" for alias in child.names}
            yield from (full if full in MODULES else str(child.module) for full in named.values())
        yield from imports(child)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {x for x in imports(tree) if x in MODULES and x != name} for name, tree in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


LAYERS = ("swaps", "attention", "surgery", "adapters evaluation", "training bench coverage", "healing", "cli")
"""Packages from the lowest up, as DESIGN.md lists them; those of one layer do not know each other."""


def test_packages_import_downward_only() -> None:
    level = {package: i for i, layer in enumerate(LAYERS) for package in layer.split()}
    assert set(level) == {path.parent.name for path in ROOT.glob("attnswap/*/__init__.py")}
    for name, tree in MODULES.items():
        package = name.split(".")[1] if name != "attnswap" else "cli"
        for other in {x.split(".")[1] for x in imports(tree) if x in MODULES and "." in x} - {package}:
            if other in level:
                assert package in level and level[other] < level[package], f"{name} imports attnswap.{other}"


def test_files_have_at_most_600_lines() -> None:
    long = {str(p) for p in ROOT.glob("attnswap/**/*.py") if len(p.read_text().splitlines()) > 600}
    assert not long


def test_functions_have_at_most_80_lines() -> None:
    """From ``def`` to the last line, docstring included."""
    found = [(name, node) for name, tree in MODULES.items() for node in ast.walk(tree)]
    found = [(name, node) for name, node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(found) > 1000
    assert not [f"{name}.{node.name}" for name, node in found if node.end_lineno - node.lineno >= 80]


def test_no_slot_can_have_the_name_of_what_its_module_has() -> None:
    own = {name for name in dir(LayerSwap(ModelInfo(1, 1, 1, None))) if not name.startswith("___")}  # torch.compile's
    assert _taken() >= own


def score(model: PreTrainedModel) -> None:
    with evaluating(model):
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("use", [check_separation, _prove, score])
def test_a_frozen_layer_stays_in_evaluation_mode(use: Callable[[PreTrainedModel], None]) -> None:
    """Trials of a model put back the mode of each module, not one mode for all."""
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    use(model)
    assert [module.training for module in model.modules()] == before
