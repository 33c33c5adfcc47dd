"""Which of transformers' model types can be patched: every type, every column."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import transformers

from attnswap.coverage.columns import AFTER, dispatch, identity, logits, undo
from attnswap.coverage.tiny import tiny_model
from attnswap.errors import ConfigError, UnsupportedModelError
from attnswap.surgery.patched import spec_of

SWAPS = ("forgetting-gate", "softpick")
"""The swaps, none of them an identity, that every type is checked with: one with state per token, one without."""
COLUMNS = ("identity", "dispatch", *AFTER, "unpatch")


@dataclass(frozen=True)
class Row:
    """One model type with one swap.

    Attributes:
        type: The type's name.
        model: Class name of the model.
        swap: The swap of the columns after the first.
        seam: "interface" or "scores"; see :class:`attnswap.surgery.spec.PatchSpec`.
        columns: "pass", what was wrong, or why it does not apply; by name.
        reason: Why the type is not patched at all.
    """

    type: str
    model: str = ""
    swap: str = ""
    seam: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    reason: str | None = None

    @property
    def passes(self) -> bool:
        """Whether every column passes, or does not apply because the stock model cannot do it either."""
        return self.reason is None and all(v == "pass" or v.startswith("stock") for v in self.columns.values())


def cover(model_type: str, swap: str) -> Row:
    """Checks one type with one swap."""
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
        for column, check in AFTER.items():
            found[column] = _outcome(lambda check=check: check(model))  # type: ignore[misc]
            if found[column] != "pass":
                found[column] = _stock_too(model_type, column, found[column])
        found["unpatch"] = _outcome(lambda: undo(model, stock))
    return Row(model_type, name, swap, "" if spec is None else spec.seam, found)


def _outcome(check: Callable[[], float]) -> str:
    try:
        check()
    except Exception as error:
        return _short(error)
    return "pass"


def _stock_too(model_type: str, column: str, said: str) -> str:
    """Returns what was said of a patched model, or that the stock model fails in the same way."""
    own = _outcome(lambda: AFTER[column](tiny_model(model_type)))
    return said if own == "pass" else f"stock: {own}"


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
    """Checks types with swaps.

    Args:
        types: Names of model types.
        swaps: Names of swaps that are no identity.
        announce: Receives every row as it is done.

    Returns:
        The report as JSON-able values.
    """
    rows = []
    for model_type in types:
        for swap in swaps:
            rows.append(cover(model_type, swap))
            announce(rows[-1])
            if rows[-1].reason and not rows[-1].swap:
                break  # no swap would change that
    passing = sorted({t for t in types if all(r.passes for r in rows if r.type == t)})
    return {
        "schema": "attnswap.coverage/1",
        "transformers": transformers.__version__,
        "swaps": list(swaps),
        "types": len(types),
        "passing": len(passing),
        "rows": [{**asdict(row), "passes": row.passes} for row in rows],
    }
