"""One file is one swap: the files written here pass the whole contract, without any other edit."""

import importlib
import importlib.util
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import attnswap
from attnswap.errors import CheckpointError, ConfigError
from attnswap.swaps import REGISTRY, Swap, resolve
from tests.helpers.contract import CHECKS, check_ids
from tests.helpers.drawing import curve
from tests.helpers.generated_code import build, check_cpp

ELEMENTWISE = '''
"""Softplus attention: w_ij = softplus(alpha z_ij) over their sum, alpha learned per head."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from attnswap.swaps import expression as fn
from attnswap.swaps.base import Feature, Swap, require


@dataclass(frozen=True)
class SoftplusWeights(Swap):
    """Positive weights that grow linearly with the score.

    Attributes:
        eps: Added to the denominator.
    """

    eps: float = 1e-4

    name: ClassVar[str] = "softplus-weights"
    paper: ClassVar[str] = "An example (arXiv 0000.00000)"
    summary: ClassVar[str] = "softplus of the score, normalised by the row"
    row_sum: ClassVar = "at most one"
    shifted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eps > 0, f"softplus-weights: eps must be positive, not {self.eps}")

    def features(self) -> dict[str, Feature]:
        return {"alpha": Feature("head", initial=1.0, what="sharpness")}

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return fn.softplus(p.alpha * s)

    def norm(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return fn.softplus(p.alpha * s)

    def null(self, shift: Any, n: Any, p: SimpleNamespace) -> Any:
        return self.eps


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(SoftplusWeights())
'''

KEY_GATE = '''
"""A learned key bias: every token says how much it wants to be looked at, w_ij = softmax_j(z_ij + c_j)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnswap.swaps.base import Call, Feature, Parameter, Swap, Terms


@dataclass(frozen=True)
class KeyBias(Swap):
    """A bias per key, linear in the hidden state; nothing changes until it is trained."""

    name: ClassVar[str] = "key-bias"
    paper: ClassVar[str] = "An example (arXiv 0000.00000)"
    summary: ClassVar[str] = "a learned bias per key"
    native_ramp: ClassVar[bool] = True

    @property
    def exact_identity(self) -> bool:
        return True

    def features(self) -> dict[str, Feature]:
        return {"key_bias": Feature("key", what="c_j")}

    def gate_parameters(self) -> dict[str, Parameter]:
        return {"key_weight": Parameter(("heads", "hidden"))}

    def gates(self, hidden: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"key_bias": torch.nn.functional.linear(hidden, parameters["key_weight"]).transpose(1, 2)}

    def terms(self, call: Call) -> Terms:
        return Terms(key_bias=call.ramp * call.features["key_bias"])


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(KeyBias())
'''

ROW = '''
"""Cubes above a threshold: w_ij = (1 + alpha (z_ij - t_i) / 3)_+ ^ 3, t_i such that a row sums to one."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from attnswap.swaps import expression as fn
from attnswap.swaps.base import Feature, Swap
from attnswap.swaps.statistics import Root, Statistic


@dataclass(frozen=True)
class CubeThreshold(Swap):
    """A sparse row swap with a sharpness per head."""

    name: ClassVar[str] = "cube-threshold"
    paper: ClassVar[str] = "An example (arXiv 0000.00000)"
    summary: ClassVar[str] = "cubes above the threshold at which a row sums to one"

    def features(self) -> dict[str, Feature]:
        return {"log_alpha": Feature("head", initial=0.0, what="logarithm of the sharpness")}

    def statistics(self) -> dict[str, Statistic]:
        return {"threshold": Root(self.cube, self.bounds, power=lambda p: 1 / 3)}

    def weight(self, s: Any, shift: Any, p: SimpleNamespace) -> Any:
        return self.cube(s, p.threshold, p)

    def cube(self, s: Any, threshold: Any, p: SimpleNamespace) -> Any:
        above = fn.relu(1 + fn.exp(p.log_alpha) * (s - threshold) / 3)
        return above * above * above

    def bounds(self, top: Any, n: Any, p: SimpleNamespace) -> tuple[Any, Any]:
        return top, top + fn.log(n) / fn.exp(p.log_alpha)


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(CubeThreshold())
'''

FILES = {"softplus-weights": ELEMENTWISE, "key-bias": KEY_GATE, "cube-threshold": ROW}
NAMES = list(FILES)


def import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Writes and imports both files; takes the swaps out of the registry again afterwards."""
    folder = tmp_path_factory.mktemp("swaps")
    written = {}
    try:
        for name, source in FILES.items():
            written[name] = folder / f"{name.replace('-', '_')}.py"
            written[name].write_text(source, encoding="utf-8")
            assert name not in REGISTRY
            import_file(written[name])
        yield written
    finally:
        for name in FILES:
            REGISTRY.pop(name, None)


@pytest.fixture
def swap(request: pytest.FixtureRequest, files: dict[str, Path]) -> Swap:
    return resolve(request.param)


both = pytest.mark.parametrize("swap", NAMES, indirect=True)


def llama(seed: int = 0) -> LlamaForCausalLM:
    """A tiny llama whose attention is far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.25)
    return model


def moved(swap: Swap) -> LlamaForCausalLM:
    """A patched llama whose swap parameters have left their start."""
    model = llama()
    attnswap.patch(model, swap)
    generator = torch.Generator().manual_seed(1)
    parameters = attnswap.swap_parameters(model)
    assert len(parameters) == 2
    for parameter in parameters.values():
        parameter.data += 0.7 * torch.randn(parameter.shape, generator=generator)
    return model


TOKENS = torch.randint(3, 61, (2, 17), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: torch.nn.Module, **options: object) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False, **options).logits


@pytest.mark.parametrize("check", CHECKS, ids=check_ids)
@both
def test_contract(swap: Swap, check):
    check(swap)


@pytest.mark.parametrize("swap", ["softplus-weights"], indirect=True)
def test_its_maths_is_printed_as_cpp(swap: Swap, tmp_path: Path):
    check_cpp(build([swap], tmp_path), swap)


@both
def test_it_is_known_everywhere(swap: Swap):
    assert swap.name in {s.name for s in attnswap.list_swaps()}
    assert getattr(attnswap, type(swap).__name__) is type(swap)
    near = swap.name[:-1]
    with pytest.raises(ConfigError, match=f'Did you mean "{swap.name}"'):
        resolve(near)
    for option in swap.to_dict().keys() - {"name"}:
        with pytest.raises(ConfigError, match=option):
            resolve({"name": swap.name, option: "many"})
    with pytest.raises(ConfigError, match="no option"):
        resolve({"name": swap.name, "epz": 1})


@both
def test_the_command_line_shows_it(swap: Swap):
    from attnswap.cli import app

    runner = CliRunner(env={"COLUMNS": "200"})
    table = runner.invoke(app, ["list"])
    assert table.exit_code == 0
    assert swap.name in table.stdout
    listed = json.loads(runner.invoke(app, ["list", "--json"]).stdout)
    entry = next(x for x in listed if x["name"] == swap.name)
    assert entry["route"] == swap.traits.route
    assert entry["summary"] == swap.summary
    markdown = runner.invoke(app, ["list", "--markdown"]).stdout
    assert re.search(rf"^\| {swap.name} \|.*{swap.traits.learned[0]}", markdown, re.MULTILINE)
    described = runner.invoke(app, ["describe", swap.name])
    assert described.exit_code == 0
    assert all(feature in described.stdout for feature in swap.features())


@both
def test_its_file_draws_its_curve(swap: Swap, files: dict[str, Path], capsys: pytest.CaptureFixture):
    known = dict(REGISTRY)
    try:
        runpy.run_path(str(files[swap.name]), run_name="__main__")
    finally:
        REGISTRY.update(known)
    weights = curve(capsys.readouterr().out)
    values = [weights[s] for s in sorted(weights)]
    assert values == sorted(values)
    assert values[0] < values[-1]


@both
def test_patch_start_and_undo(swap: Swap):
    model, stock = llama(), llama()
    report = attnswap.patch(model, swap)
    assert type(swap).__name__ in str(report)
    difference = (logits(model) - logits(stock)).abs().max()
    assert difference <= 1e-5 if swap.traits.exact_identity else difference > 1e-2
    attnswap.set_ramp(model, 0.0)
    assert torch.equal(logits(model), logits(stock))
    attnswap.unpatch(model)
    assert torch.equal(logits(model), logits(stock))
    assert not attnswap.swap_parameters(model)


@both
def test_heads_and_layers_can_be_chosen(swap: Swap):
    model, stock = llama(), llama()
    attnswap.patch(model, swap, layers=[1], heads=[2, 0])
    for parameter in attnswap.swap_parameters(model).values():
        assert parameter.shape[0] == 2
        parameter.data += 0.7
    assert (logits(model) - logits(stock)).abs().max() > 1e-2


@both
def test_decoding_with_a_cache_equals_the_whole(swap: Swap):
    model = moved(swap)
    whole = logits(model)
    assert (whole - logits(llama())).abs().max() > 1e-2
    cache, steps = None, []
    with torch.no_grad():
        for piece in TOKENS.split([9, 3, 1, 1, 1, 1, 1], 1):
            out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-4


@both
def test_padded_rows_equal_unpadded_ones(swap: Swap):
    model = moved(swap)
    alone = logits(model)
    padded = torch.cat([torch.full((2, 4), 5), TOKENS], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(input_ids=padded, attention_mask=mask, position_ids=position).logits[:, 4:]
    assert (found - alone).abs().max() < 1e-4


@both
def test_training_moves_only_its_parameters(swap: Swap):
    model = llama()
    attnswap.patch(model, swap)
    ours = attnswap.swap_parameters(model)
    before = {name: p.detach().clone() for name, p in ours.items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ours)
    groups = attnswap.parameter_groups(model, lr=0.01)
    assert sum(len(g["params"]) for g in groups) == len(ours)
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(12):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3
    assert all((ours[name] - before[name]).abs().max() > 1e-2 for name in ours)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_saves_and_reloads_exactly(swap: Swap, dtype: torch.dtype, tmp_path: Path):
    model = moved(swap)
    attnswap.set_ramp(model, 0.75)
    if dtype != torch.float32:  # as transformers loads it, which keeps the rotary table in fp32
        model.save_pretrained(tmp_path / "wide")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "model")
    for load in (AutoModelForCausalLM.from_pretrained, attnswap.from_pretrained):
        reloaded = load(tmp_path / "model", dtype=dtype)
        assert torch.equal(logits(reloaded), wanted)
        again = attnswap.swap_parameters(reloaded)
        assert all(
            torch.equal(again[n], p) and p.dtype == torch.float32 for n, p in attnswap.swap_parameters(model).items()
        )
    assert type(swap).__name__ in str(attnswap.describe(reloaded))


@both
def test_its_checkpoint_is_refused_where_the_file_was_not_imported(swap: Swap, tmp_path: Path):
    moved(swap).save_pretrained(tmp_path / "model")
    known = REGISTRY.pop(swap.name)
    try:
        for load in (AutoModelForCausalLM.from_pretrained, attnswap.from_pretrained):
            with pytest.raises(CheckpointError, match=swap.name):
                load(tmp_path / "model")
    finally:
        REGISTRY[swap.name] = known
