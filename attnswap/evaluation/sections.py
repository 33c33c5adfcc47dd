"""The report of the long-context suite, as sections with a text, a table, a picture and the data."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from attnswap.errors import ConfigError
from attnswap.evaluation.bootstrap import compare, standard_error
from attnswap.evaluation.retrieval import Cell
from attnswap.evaluation.suite import BITS, Profile, gain_from_context

SCHEMA = "attnswap.suite/1"


def suite_report(found: Profile, reference: Profile | None = None, *, title: str | None = None) -> dict[str, Any]:
    """Returns the report of the suite as plain JSON values.

    Args:
        found: The measurements of the model.
        reference: The measurements of the model before patching, with the same options.
        title: Title of the report; default: the model's name.

    Raises:
        ConfigError: The two were measured with different options.
    """
    if reference is not None and [_key(c) for c in found.retrieval] != [_key(c) for c in reference.retrieval]:
        raise ConfigError("the two models were measured with different prompts: measure both with the same options")
    evaluation = found.evaluation
    sections = [_perplexity, _gain, _position, _retrieval, _structure, _quantized, _fidelity]
    return {
        "schema": SCHEMA,
        "title": title or evaluation.label,
        "created": evaluation.created,
        "model": {
            **evaluation.model,
            "swapped": evaluation.swap is not None,
            "compared with": None if reference is None else reference.evaluation.model["id"],
        },
        "swap": evaluation.swap,
        "original": None if reference is None else reference.evaluation.model,
        "corpus": evaluation.corpus,
        "protocol": evaluation.protocol.to_dict(),
        "options": asdict(found.options),
        "environment": evaluation.env,
        "notes": evaluation.notes,
        "sections": [made for make in sections if (made := make(found, reference)) is not None],
    }


def _key(cell: Cell) -> tuple[str, int, float, int]:
    return cell.task, cell.length, cell.depth, cell.n


@dataclass
class _Section:
    name: str
    title: str
    text: str
    columns: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    picture: str | None = None
    data: Any = None

    def to_dict(self) -> dict[str, Any]:
        table = {"columns": self.columns, "rows": self.rows}
        return {
            "name": self.name,
            "title": self.title,
            "text": self.text,
            "table": table,
            "picture": self.picture,
            "data": self.data,
        }


def _perplexity(found: Profile, reference: Profile | None) -> dict[str, Any]:
    section = _Section(
        "perplexity",
        "Perplexity by context",
        "The same tokens are scored at every length, each once and with at least half a window of text before it.",
        ["context", "perplexity", "bits per byte", "standard error (nats)"],
        picture="perplexity.png",
        data=[vars(m) | {} for m in found.evaluation.metrics],
    )
    against = {} if reference is None else {c.length: c for c in compare(found.evaluation, reference.evaluation)}
    if reference is not None:
        section.columns += ["original", "ratio", "95% from", "to"]
    for entry in found.evaluation.metrics:
        row: list[Any] = [entry.length, entry.ppl, entry.bpb, entry.se]
        if reference is not None:
            c = against[entry.length]
            row += [reference.evaluation.at(entry.length).ppl, c.ratio, float(np.exp(c.lo)), float(np.exp(c.hi))]
        section.rows.append(row)
    return section.to_dict()


def _position(found: Profile, reference: Profile | None) -> dict[str, Any] | None:
    curve = found.evaluation.position_nll
    if not curve:
        return None
    theirs = {} if reference is None else {entry.lo: entry.nll for entry in reference.evaluation.position_nll}
    section = _Section(
        "position",
        "NLL by position",
        f"Nats per token, by the number of tokens before it in windows of {max(found.evaluation.nll)} tokens.",
        ["from", "to", "NLL", "tokens", *(["original"] if theirs else [])],
        data=[vars(entry) | {} for entry in curve],
    )
    for entry in curve:
        section.rows.append([entry.lo, entry.hi, entry.nll, entry.n, *([theirs[entry.lo]] if theirs else [])])
    return section.to_dict()


def _gain(found: Profile, reference: Profile | None) -> dict[str, Any] | None:
    gains = gain_from_context(found.evaluation)
    if not gains:
        return None
    theirs = {} if reference is None else {g.context: g for g in gain_from_context(reference.evaluation)}
    shortest = min(found.evaluation.nll)
    section = _Section(
        "gain",
        "Gain from context",
        f"Nats per token gained by a longer context over {shortest} tokens, on the same tokens.",
        ["context", "gain", "95% from", "to", *(["original"] if theirs else [])],
        data=[vars(g) for g in gains],
    )
    for g in gains:
        section.rows.append([g.context, g.gain, g.lo, g.hi, *([theirs[g.context].gain] if theirs else [])])
    return section.to_dict()


def _retrieval(found: Profile, reference: Profile | None) -> dict[str, Any]:
    section = _Section(
        "retrieval",
        "Retrieval",
        "Answers are teacher-forced. Exact is the share of answers whose every token was the most probable one; rank "
        "is the mean rank of an answer's tokens in the vocabulary (1 is best). Both are means over depths; the picture "
        "shows every depth.",
        ["task", "length", "exact", "rank", *(["exact, original", "rank, original"] if reference else [])],
        picture="retrieval.png",
        data=[cell.to_dict() for cell in found.retrieval],
    )
    for task, length in dict.fromkeys((c.task, c.length) for c in found.retrieval):
        row: list[Any] = [task, length]
        for one in (found, reference):
            if one is not None:
                cells = [c for c in one.retrieval if (c.task, c.length) == (task, length)]
                row += [float(np.mean([c.accuracy for c in cells])), float(np.mean([c.rank for c in cells]))]
        section.rows.append(row)
    return section.to_dict()


def _structure(found: Profile, reference: Profile | None) -> dict[str, Any]:
    ours = found.structure.summary()
    section = _Section(
        "structure",
        "Attention structure",
        "A sink is a head that gives the first token a weight above 0.3 on average. A dead head attends to nothing for "
        "95% of the queries. Activations are the hidden states after each layer.",
        ["figure", "value", *(["original"] if reference else [])],
        picture="structure.png",
        data=found.structure.to_dict(),
    )
    theirs = None if reference is None else reference.structure.summary()
    for name, value in ours.items():
        section.rows.append([name.replace("_", " "), value, *([] if theirs is None else [theirs[name]])])
    return section.to_dict()


def _quantized(found: Profile, reference: Profile | None) -> dict[str, Any]:
    section = _Section(
        "quantization",
        "Rounded weights",
        "Nats per token lost when the weights of linear layers are rounded to int8 or int4 levels, in groups of 64. "
        f"This rounds {found.rounded_share:.0%} of the model's parameters. No number: the losses were not finite."
        + (" The difference is paired by token, with its standard error." if reference else ""),
        ["weights", "NLL", "lost", *(["lost, original", "difference", "standard error"] if reference else [])],
    )
    section.data = {name: float(nll.astype(np.float64).mean()) for name, nll in found.quantized.items()}
    for name in ("full", *(f"int{bits}" for bits in BITS)):
        lost = [_lost(profile, name) for profile in (found, reference) if profile is not None]
        row = [name, section.data.get(name), *(None if one is None else float(one.mean()) for one in lost)]
        if reference is not None:
            ours, theirs = lost
            more = None if ours is None or theirs is None or name == "full" else ours - theirs
            row += [None, None] if more is None else [float(more.mean()), standard_error(more)]
        section.rows.append(row)
    return section.to_dict()


def _lost(profile: Profile, name: str) -> np.ndarray | None:
    """Returns how many nats each token loses by rounding; None if the rounded model has no finite losses."""
    full = profile.quantized["full"].astype(np.float64)
    return profile.quantized[name] - full if name in profile.quantized else None


def _fidelity(found: Profile, reference: Profile | None) -> dict[str, Any] | None:
    if found.fidelity is None:
        return None
    values = found.fidelity.to_dict()
    return _Section(
        "fidelity",
        "Divergence from the original",
        "KL(original || model) of the next-token distributions, and how often both agree on the most probable token.",
        ["figure", "value"],
        rows=[
            ["KL (nats per token)", values["kl"]],
            ["same most likely token", values["top1"]],
            ["tokens", values["tokens"]],
        ],
        data=values,
    ).to_dict()
