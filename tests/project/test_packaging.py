"""What is installed and what is published."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.helpers.paths import ROOT

DATA = (".cpp", ".h", "/schema.json", "/py.typed", "/__init__.pyi")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, int]]:
    """Names and sizes of the files in the wheel and in the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as file:
        installed = {x.filename: x.file_size for x in file.infolist()}
    with tarfile.open(source) as file:
        published = {m.name.partition("/")[2]: m.size for m in file.getmembers() if m.isfile()}
    return installed, published


def test_the_wheel_holds_code_and_recipes_alone(built: tuple[dict[str, int], dict[str, int]]) -> None:
    installed = {name: size for name, size in built[0].items() if ".dist-info/" not in name}
    recipes = {name for name in installed if name.startswith("attnswap/recipes/")}
    assert recipes == {f"attnswap/{path.relative_to(ROOT)}" for path in ROOT.glob("recipes/**/*.yaml")}
    assert all(name.startswith("attnswap/") for name in installed)
    other = {name for name in installed.keys() - recipes if not name.endswith(".py")}
    assert {name for name in other if not name.endswith(DATA)} == set()
    assert {"attnswap/py.typed", "attnswap/__init__.pyi"} <= other
    assert sum(installed.values()) < 2e6


def test_wheel_and_source_distribution_agree(built: tuple[dict[str, int], dict[str, int]]) -> None:
    installed, published = built
    for name, size in installed.items():
        if ".dist-info/" not in name:
            source = name.removeprefix("attnswap/") if name.startswith("attnswap/recipes/") else name
            assert published.get(source) == size, name
    assert {name for name in published if name.startswith("attnswap/")} <= installed.keys()
    assert not [name for name in published if name.startswith(("results/", "docs/", "notebooks/"))]
