"""Settings of the test run, and fixtures of all tests."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor
from transformers import PreTrainedModel

import attnswap
from attnswap import cli
from tests.helpers.devices import device_of
from tests.helpers.ids import case_id
from tests.helpers.patched_models import move_away
from tests.helpers.thinning import axes_of, kept
from tests.helpers.tiny_models import VOCABULARY, tiny

settings.register_profile(
    "whole", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=40
)
settings.register_profile("quick", settings.get_profile("whole"), max_examples=8)
settings.load_profile("quick")  # --hypothesis-profile=whole comes after this


@pytest.hookimpl(tryfirst=True)  # before what is slow is left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves all but one of n of a grid's cases to make test-all, so that each value of each axis stays."""
    grids: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("thinned"):
            grids.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in grids.values():
        chosen = kept([axes_of(item) for item in cases], cases[0].get_closest_marker("thinned").args[0])
        for position, item in enumerate(cases):
            if position not in chosen:
                item.add_marker(pytest.mark.slow)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names the cases of a test by what they hold, where pytest would number them."""
    return case_id(val, argname)


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Two rows of twenty random tokens."""
    return torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def patched():
    """Builds a tiny patched model away from identity."""

    def build(kind: str = "llama", swap="ssmax", length: int = 20, **options) -> PreTrainedModel:
        model = tiny(kind)
        attnswap.patch(model, swap, **options)
        move_away(model, length)
        return model

    return build


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process and returns (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attnswap", *map(str, arguments)])
        capsys.readouterr()  # what fixtures printed
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process whose Triton interprets kernels on the CPU."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
        pool = ProcessPoolExecutor(1, get_context("spawn"))
        pool.submit(torch.set_num_threads, 1).result()
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(scope="session")
def worker(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a function where Triton's kernels run: here if there is a GPU, else where they are interpreted."""
    if device_of("triton") == "cuda":
        return lambda function, *args: function(*args)
    return request.getfixturevalue("interpreted")


def pytest_collection_finish() -> None:
    """Keeps what was imported out of searches through living objects, of which every patch makes several."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Lets what was kept out be freed in the end: libraries report as leaked what is not."""
    gc.unfreeze()
