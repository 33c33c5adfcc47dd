"""The quickstart notebook: executed as a reader would, in a kernel of the running interpreter, without a network."""

import base64
import json
import math
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.helpers.paths import ROOT

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
PNG = b"\x89PNG\r\n\x1a\n"

# Runs in the kernel after the notebook's own cells: what they computed, for the tests below.
COLLECT = """
import json, sys
found = {
    "python": sys.executable,
    "package": attnswap.__file__,
    "patched_layers": report.patched_layers,
    "identity_change": identity_change,
    "published_change": published_change,
    "unpatched_equal": unpatched_equal,
    "restored": restored,
    "softpick_change": (softpick_logits - eager_logits).abs().max().item(),
    "softmax_rows": [softmax_weights.sum(-1).min().item(), softmax_weights.sum(-1).max().item()],
    "softpick_rows": [softpick_weights.sum(-1).min().item(), softpick_weights.sum(-1).max().item()],
    "sinks": [before.mean().item(), after.mean().item()],
    "head_sinks": [before[layer, head].item(), after[layer, head].item()],
    "zeros": zeros,
    "mixed": mixed.rows(),
    "ramp_zero_equal": ramp_zero_equal,
    "ramps": ramps,
    "perplexities": perplexities,
    "ratios": [r.ratio for r in ratios],
    "scored": [e.protocol.scored_tokens for e in evaluations],
    "ungated": ungated.tolist(),
    "cached": cached.tolist(),
    "recomputed": recomputed.tolist(),
    "gated_change": (gated - original).abs().max().item(),
    "reload_equal": reload_equal,
    "reloaded_layers": attnswap.describe(reloaded).patched_layers,
    "reloaded_gain": sorted({p.mean().item() for n, p in attnswap.swap_parameters(reloaded).items() if "gain" in n}),
    "differences": differences,
    "curve_points": [len(line.get_xdata()) for line in ramp_figure.axes[0].lines],
    "images": [axis.images[0].get_array().shape for axis in sink_figure.axes[:2]],
    "tokens": batch.input_ids.shape[1],
}
print(json.dumps(found))
"""


def outputs_of(notebook, cell_id):
    return next(cell.outputs for cell in notebook.cells if cell.id == cell_id)


def printed_by(notebook, cell_id):
    return "".join(o.text for o in outputs_of(notebook, cell_id) if o.output_type == "stream" and o.name == "stdout")


def execute(directory):
    """Executes a copy of the notebook in a directory of its own; a cell that raises fails with its traceback."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(COLLECT, id="collect"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("IPYTHONDIR", str(directory / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(directory / "runtime"))
        patch.delenv("MPLBACKEND", raising=False)
        # Without kernel directories only ipykernel's own spec is found: sys.executable, whatever is registered.
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
        resources = {"metadata": {"path": str(directory)}}
        NotebookClient(notebook, km=manager, timeout=120, resources=resources).execute()
    return notebook


def test_committed_clean():
    """Valid, without outputs, and with one name for each cell."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in notebook.cells if c.cell_type == "code")
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@pytest.mark.slow
def test_quickstart(tmp_path):
    """One test, so that parallel workers execute the notebook once."""
    executed = execute(tmp_path)
    found = json.loads(printed_by(executed, "collect"))
    assert found["python"] == sys.executable
    assert Path(found["package"]).is_relative_to(ROOT)
    check_patch_and_undo(executed, found)
    check_weights(found)
    check_mixed_swaps(found)
    check_ramp(executed, found)
    check_generation(found)
    check_reload(found)
    check_pure_function(found)
    for cell_id in ("heatmaps", "ramp-figure"):
        check_figure(executed, cell_id)


def check_patch_and_undo(executed, found):
    assert found["patched_layers"] == list(range(30))
    assert found["identity_change"] <= 1e-5
    assert found["published_change"] > 1e-2
    assert found["unpatched_equal"] is True
    assert "30 of 30 layers swapped, 540 new parameters" in printed_by(executed, "patch")


def check_weights(found):
    assert found["restored"] is True
    assert found["softpick_change"] > 1e-2
    assert found["softmax_rows"] == pytest.approx([1, 1], abs=1e-5)
    low, high = found["softpick_rows"]
    assert 0 <= low < 0.5 and high <= 1 + 1e-5
    assert found["zeros"] > 0.05
    assert found["sinks"][1] < found["sinks"][0]
    assert found["head_sinks"][0] - found["head_sinks"][1] > 0.3
    assert found["images"] == [[found["tokens"]] * 2] * 2


def check_mixed_swaps(found):
    served = [(layers, heads, attention.partition("(")[0].strip()) for layers, heads, attention, _ in found["mixed"]]
    assert ("20-29", "0,1,2", "ForgettingGate") in served
    assert ("20-29", "3,4,5", "SSMax") in served
    assert ("20-29", "6,7,8", "as before") in served
    assert ("0-1", "8", "Softpick") in served
    assert ("2-19", "all", "as before") in served


def check_ramp(executed, found):
    assert found["ramp_zero_equal"] is True
    assert found["ramps"] == [0.0, 0.25, 0.5, 1.0]
    assert found["scored"] == [512] * 4
    assert len(found["perplexities"]) == 4
    assert all(math.isfinite(p) and p > 1 for p in found["perplexities"])
    assert found["perplexities"][0] < 40  # the model as it was: it knows the language
    assert found["ratios"][0] == 1
    assert found["ratios"][-1] > 1.5  # untrained, the swap hurts
    assert f"multiplies the perplexity by {found['ratios'][-1]:.2f}" in printed_by(executed, "cost")
    assert found["curve_points"][0] == len(found["ramps"])


def check_generation(found):
    assert found["gated_change"] > 1e-2
    assert len(found["cached"]) == len(found["ungated"]) == 12
    assert found["cached"] == found["recomputed"]
    assert found["cached"] != found["ungated"]


def check_reload(found):
    assert found["reload_equal"] is True
    assert found["reloaded_layers"] == list(range(30))
    assert found["reloaded_gain"] == pytest.approx([0.2])


def check_pure_function(found):
    differences = found["differences"]
    assert differences["softpick and softmax"] > 1e-2
    assert differences["forgetting gate and softmax"] > 1e-2
    assert differences["softpick at lambda 0 and softmax"] <= 1e-5
    assert differences["forgetting gate: fast path and dense reference"] <= 1e-5


def check_figure(executed, cell_id):
    shown = [o.data["image/png"] for o in outputs_of(executed, cell_id) if "image/png" in o.get("data", {})]
    assert len(shown) == 1
    image = base64.b64decode(shown[0])
    assert image.startswith(PNG) and len(image) > 5000
