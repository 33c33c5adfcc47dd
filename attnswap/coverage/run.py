"""Run all checks on the model types of transformers."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import transformers

from attnswap.coverage.columns import PATCHED_CHECKS, dispatch, identity, logits, undo
from attnswap.coverage.tiny import tiny_model
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.patched import spec_of

SWAPS = ("forgetting-gate", "softpick")
"""The swaps that every type is checked with: one with state per token, one without. Neither starts as softmax."""
COLUMNS = ("identity", "dispatch", *PATCHED_CHECKS, "unpatch")


@dataclass(frozen=True)
class Row:
    """The results of one model type with one swap.

    Attributes:
        type: Name of the model type.
        model: Class name of the model.
        swap: The swap. The first column uses one that starts as softmax.
        seam: "interface" or "scores"; see :class:`attnswap.surgery.spec.PatchSpec`.
        columns: Result of each check by name: "pass", or an error. If the unpatched model fails too, the error begins
            with "stock".
        reason: Why the type cannot be patched at all, or None.
    """

    type: str
    model: str = ""
    swap: str = ""
    seam: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def passes(self) -> bool:
        """Whether every check passes, or fails for the unpatched model too."""
        return self.reason is None and all(v == "pass" or v.startswith("stock") for v in self.columns.values())


def cover(model_type: str, swap: str) -> Row:
    """Runs all checks on one model type with one swap."""
    try:
        with _silence():
            model = tiny_model(model_type)
    except Exception as error:
        return Row(model_type, reason=f"no tiny model can be built here: {_short(error)}")
    name = type(model).__name__
    try:
        with _silence():
            stock = logits(model)
    except Exception as error:
        return Row(model_type, name, reason=f"the stock model does not run on token ids alone: {_short(error)}")
    found: dict[str, str] = {}
    try:
        with _silence():
            found["identity"] = _outcome(lambda: identity(model, stock))
            dispatch(model, stock, swap)
            found["dispatch"] = "pass"
    except (ConfigError, UnsupportedModelError) as error:
        return Row(model_type, name, swap, reason=f"refused: {error}")
    except Exception as error:
        return Row(model_type, name, swap, columns={**found, "dispatch": _short(error)})
    spec = spec_of(model)
    with _silence():
        for column, check in PATCHED_CHECKS.items():
            found[column] = _outcome(lambda check=check: check(model))  # type: ignore[misc]
            if found[column] != "pass":
                found[column] = _or_stock_failure(model_type, column, found[column])
        found["unpatch"] = _outcome(lambda: undo(model, stock))
    return Row(model_type, name, swap, "" if spec is None else spec.seam, found)


def _outcome(check: Callable[[], float]) -> str:
    try:
        check()
    except Exception as error:
        return _short(error)
    return "pass"


def _or_stock_failure(model_type: str, column: str, error: str) -> str:
    """Returns the error of a patched model, or that of the unpatched model if the check fails for it too."""
    stock = _outcome(lambda: PATCHED_CHECKS[column](tiny_model(model_type)))
    return error if stock == "pass" else f"stock: {stock}"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def run_coverage(
    types: Sequence[str], swaps: Sequence[str] = SWAPS, announce: Callable[[Row], None] = lambda row: None
) -> dict[str, Any]:
    """Runs all checks on some model types with some swaps.

    Args:
        types: Names of model types.
        swaps: Names of swaps that do not start as softmax.
        announce: Called with each row when it is done.

    Returns:
        The report as plain values.
    """
    rows = []
    for model_type in types:
        for swap in swaps:
            rows.append(cover(model_type, swap))
            announce(rows[-1])
            if rows[-1].reason and not rows[-1].swap:
                break  # the reason does not depend on the swap
    passing = sorted({t for t in types if all(r.passes for r in rows if r.type == t)})
    return {
        "schema": "attnswap.coverage/1",
        "transformers": transformers.__version__,
        "swaps": list(swaps),
        "types": len(types),
        "passing": len(passing),
        "rows": [{**asdict(row), "passes": row.passes} for row in rows],
    }
