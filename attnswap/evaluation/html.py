"""A report of the long-context suite as one self-contained HTML file, without scripts."""

import base64
import json
import mimetypes
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from attnswap.errors import ConfigError
from attnswap.evaluation.result import write_atomically
from attnswap.visible import visible

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Content security policy: the page may use its own styles and embedded pictures, and load nothing else."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5a6672; --paper: #fff; --card: #f5f7f9; --line: #dce1e7;
  --link: #0b5cad; --stripe: #f9fafb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9ba7b3; --paper: #13171b; --card: #1c2228; --line: #333c45; --link: #7fbaf5;
    --stripe: #181d22 }
  img { filter: brightness(.88) }
}
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif }
.page { max-width: 78rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.1rem); line-height: 1.2; margin: 0 0 1rem }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .5rem }
p { margin: 0 0 1rem; max-width: 46rem }
a { color: var(--link); text-decoration: none }
a:hover { text-decoration: underline }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(8.5rem, 100%), 1fr)); gap: .75rem 1rem;
  margin: 0 0 1.5rem; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
dt { color: var(--soft); font-size: .8rem }
dd { margin: 0; font-variant-numeric: tabular-nums }
nav { margin: 0 0 2rem; font-size: .95rem }
nav strong { display: block; color: var(--soft); font-size: .8rem; font-weight: 600 }
nav ol { margin: .25rem 0 0; padding-left: 1.4rem }
nav li { padding: .15rem 0 }
section { margin: 0 0 2.5rem; padding-top: 1.5rem; border-top: 1px solid var(--line) }
.table { overflow-x: auto; width: fit-content; min-width: min(28rem, 100%); max-width: 100%; margin: 0 0 1.25rem;
  border: 1px solid var(--line); border-radius: .5rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { padding: .45rem .6rem; text-align: left; white-space: nowrap; background: var(--paper) }
th { background: var(--card); color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line) }
tbody tr:nth-child(even) td { background: var(--stripe) }
:is(th, td):first-child { position: sticky; left: 0 }
:is(th, td):first-child:not(.number) { min-width: 8rem; white-space: normal; overflow-wrap: anywhere }
.number { text-align: right }
figure { margin: 0; overflow-x: auto }
img { display: block; max-width: max(100%, 36rem); height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .5rem }
@media (min-width: 64rem) {
  .columns { display: grid; grid-template-columns: 12rem minmax(0, 1fr); gap: 2rem }
  dl { grid-template-columns: repeat(auto-fill, minmax(12rem, 1fr)) }
  nav { position: sticky; top: 1.5rem; align-self: start; max-height: calc(100vh - 3rem); overflow-y: auto }
  main section:first-child { border-top: 0; padding-top: 0 }
}
@media print { nav { display: none } .columns { display: block } section { break-inside: avoid } }
"""


def write_html(report: dict[str, Any], pictures: Sequence[tuple[str, Path]], path: str | Path, *, title: str) -> Path:
    """Writes a report as an HTML page, with its JSON embedded for programs.

    Args:
        report: Plain JSON values: ``model`` and ``notes``, a list of sentences (both shown at the top), and
            ``sections``, a list of dicts with ``title``, ``text``, ``table`` (``columns`` and ``rows``) and
            ``picture`` (a file name); all but the title may be missing or None. The page contains the complete report
            in ``<script type="application/json" id="report">``.
        pictures: File names as the sections give them, and the path of each file.
        path: The HTML file, written atomically.
        title: Heading of the page.

    Returns:
        The path.

    Raises:
        ConfigError: A section names a picture that is not among the pictures or cannot be read, or the report contains
            a value that is not JSON, such as NaN.
        ValueError: The rows of a table have another number of cells than it has columns.
    """
    try:
        # A script's text ends at "</script", and "<!--" changes where; \u003c is the same character in JSON.
        embedded = json.dumps(report, allow_nan=False).replace("<", "\\u003c")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the report is not plain JSON: {error}") from error
    files, sections = dict(pictures), report.get("sections") or []
    links = "\n".join(f'<li><a href="#s{i}">{escape(_name(s))}</a></li>' for i, s in enumerate(sections, 1))
    contents = f'<nav aria-label="Contents"><strong>Contents</strong>\n<ol>\n{links}\n</ol></nav>\n' if links else ""
    main = "\n".join(_section(index, section, files) for index, section in enumerate(sections, 1))
    notes = "".join(f"<p>{escape(shown(note))}</p>\n" for note in report.get("notes") or [])
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(visible(title))}</title>
<style>{STYLE}</style>
</head>
<body>
<div class="page">
<header>
<h1>{escape(visible(title))}</h1>
{_facts(report.get("model") or {})}{notes}</header>
<div class="columns">
{contents}<main>
{main}
</main>
</div>
</div>
<script type="application/json" id="report">{embedded}</script>
</body>
</html>
"""
    write_atomically(Path(path), page.encode(errors="replace"))  # undecodable file names are still intact in the JSON
    return Path(path)


def shown(value: Any) -> str:
    """Formats a value for readers: four significant digits, ``-`` for None, yes or no. Not escaped for HTML."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        rounded = float(f"{value:.4g}")
        if 1e4 <= abs(rounded) < 1e9:
            return f"{rounded:,.0f}"
        return f"{value:#.4g}".rstrip(".")  # keeps trailing zeros, so that the digits of a column align
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {shown(entry)}" for key, entry in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(shown(entry) for entry in value) + "]"
    return visible(value)


def _name(section: Mapping[str, Any]) -> str:
    return visible(section.get("title") or section["name"])


def _facts(values: Mapping[str, Any]) -> str:
    entries = (f"<div><dt>{escape(shown(key))}</dt><dd>{escape(shown(v))}</dd></div>\n" for key, v in values.items())
    return f"<dl>\n{''.join(entries)}</dl>\n" if values else ""


def _section(index: int, section: Mapping[str, Any], files: Mapping[str, Path]) -> str:
    title = escape(_name(section))
    text, table, picture = section.get("text"), section.get("table"), section.get("picture")
    parts = [f'<section id="s{index}" aria-labelledby="t{index}">', f'<h2 id="t{index}">{title}</h2>']
    if text:
        parts.append(f"<p>{escape(shown(text))}</p>")
    if table:
        # Focusable, so that a table too wide for the screen can be scrolled with the keyboard.
        scroll = f'<div class="table" role="region" aria-labelledby="t{index}" tabindex="0">'
        parts.append(f"{scroll}{_table(table['columns'], table['rows'])}</div>")
    if picture:
        if picture not in files:
            raise ConfigError(f'the section "{_name(section)}" names the picture "{picture}", which was not given')
        parts.append(f'<figure tabindex="0"><img src="{_data_uri(files[picture])}" alt="{title}"></figure>')
    return "\n".join([*parts, "</section>"])


def _table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    numeric = [_numeric(values) for values in zip(*rows, strict=True)] or [False] * len(columns)
    marks = [' class="number"' if right else "" for right in numeric]

    def line(tag: str, values: Sequence[Any], scope: str = "") -> str:
        cells = (
            f"<{tag}{scope}{mark}>{escape(shown(value))}</{tag}>" for value, mark in zip(values, marks, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head = line("th", columns, ' scope="col"')
    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _numeric(values: Sequence[Any]) -> bool:
    """Whether a column contains numbers, of which some may be missing."""
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)


def _data_uri(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f'cannot read the picture "{path}": {error}') from error
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
