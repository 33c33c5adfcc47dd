"""The layout of the code and of its tests: who imports whom, and how long files and functions are."""

import ast
import graphlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from attnswap.modes import evaluating
from attnswap.surgery.module import LayerSwap
from attnswap.surgery.spec import _taken
from attnswap.swaps import ModelInfo
from attnswap.training.loss import _check_head
from attnswap.training.packing import check_separation
from tests.helpers.paths import ROOT
from tests.helpers.thinning import kept
from tests.helpers.tiny_models import tiny

PACKAGE = ROOT / "attnswap"
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


def imports_of(path: Path) -> set[str]:
    """Every module or name that a file imports, wherever in the file, as absolute names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def within(name: str, *allowed: str) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


HELPERS = ("attnswap.errors", "attnswap.hints", "attnswap.imports")
"""Helpers that need nothing but the standard library."""


@pytest.mark.parametrize("path", sorted((PACKAGE / "swaps").glob("*.py")), ids=lambda p: p.name)
def test_swaps_import_only_torch_and_themselves(path: Path):
    for name in imports_of(path):
        standard = name.split(".")[0] in sys.stdlib_module_names
        assert standard or within(name, "torch", "attnswap.swaps", *HELPERS), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "attention").glob("*.py")), ids=lambda p: p.name)
def test_attention_imports_only_torch_and_swaps(path: Path):
    for name in imports_of(path):
        standard = name.split(".")[0] in sys.stdlib_module_names
        allowed = within(name, "torch", "attnswap.attention", "attnswap.swaps", "attnswap.errors")
        assert standard or allowed, f"{path.name} imports {name}"


def test_imports_point_downward():
    above = {
        "surgery": ["evaluation", "training", "cli"],
        "evaluation": ["training", "cli"],
        "training": ["cli"],
        "": ["cli", "training"],  # the package itself and its single files
    }
    for folder, forbidden in above.items():
        files = (PACKAGE / folder).glob("*.py")
        for path in files:
            for name in imports_of(path):
                bad = within(name, *(f"attnswap.{part}" for part in forbidden))
                assert not bad, f"{path.relative_to(PACKAGE)} imports {name}"


def test_files_have_at_most_600_lines() -> None:
    files = [*ROOT.glob("attnswap/**/*.py"), *ROOT.glob("tests/**/*.py")]
    assert not {str(p.relative_to(ROOT)) for p in files if len(p.read_text().splitlines()) > 600}


def test_no_test_module_imports_another() -> None:
    """What several test modules use is in tests/helpers, or is a fixture of a conftest."""
    files = list(ROOT.glob("tests/**/*.py"))
    modules = {path.stem for path in files if path.stem.startswith("test_")} | {"conftest"}
    assert len(modules) > 50
    for path in files:
        for name in imports_of(path):
            assert modules.isdisjoint(name.split(".")), f"{path.relative_to(ROOT)} imports {name}"


def test_every_package_has_its_folder_of_tests() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {path.parent.name for path in ROOT.glob("tests/*/test_*.py")} == packages | {"project"}
    folders = {path.parent for path in ROOT.glob("tests/**/*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_the_id_of_a_case_says_what_it_holds(request: pytest.FixtureRequest) -> None:
    """pytest numbers what has no name, such as ``options3``; such cases need ``ids=`` in their parametrization."""
    for item in request.session.items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            numbered = {f"{name}{index}" for name, index in item.callspec.indices.items()}
            assert numbered.isdisjoint(item.callspec.id.split("-")), item.nodeid
            assert not re.search(r"<lambda>|<function|<class| at 0x", item.callspec.id), item.nodeid


@pytest.mark.parametrize("n", [2, 3, 10])
@pytest.mark.parametrize("sizes", [(2, 2), (7, 4), (8, 12, 2), (3, 1, 5)])
def test_a_thinned_grid_keeps_each_value_of_each_axis(sizes: tuple[int, ...], n: int) -> None:
    cases = list(itertools.product(*map(range, sizes)))
    chosen = kept(cases, n)
    for axis, size in enumerate(sizes):
        assert {cases[i][axis] for i in chosen} == set(range(size))
    assert len(chosen) <= len(cases) / n + sum(sizes)


def test_functions_have_at_most_80_lines() -> None:
    """From ``def`` to the last line, docstring included."""
    found = [(name, node) for name, tree in MODULES.items() for node in ast.walk(tree)]
    found = [(name, node) for name, node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert len(found) > 1000
    assert not [f"{name}.{node.name}" for name, node in found if node.end_lineno - node.lineno >= 80]


def test_no_slot_can_have_the_name_of_what_its_module_has() -> None:
    _taken.cache_clear()  # transformers adds a method to every module when it first initialises a model
    own = {name for name in dir(LayerSwap(ModelInfo(1, 1, 1, None))) if not name.startswith("___")}  # torch.compile's
    assert _taken() >= own


def score(model: PreTrainedModel) -> None:
    with evaluating(model):
        assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("use", [check_separation, _check_head, score])
def test_a_frozen_layer_stays_in_evaluation_mode(use: Callable[[PreTrainedModel], None]) -> None:
    """Trials of a model put back the mode of each module, not one mode for all."""
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    use(model)
    assert [module.training for module in model.modules()] == before
