"""A headless Chromium that opens the pages of reports."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
PROBE = """<!DOCTYPE html><iframe id="frame" width="{width}" height="2000" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>addEventListener("load", () => {{
  const inside = document.getElementById("frame").contentDocument
  const all = (query) => [...inside.querySelectorAll(query)]
  document.getElementById("found").textContent = JSON.stringify({{
    text: inside.body.innerText,
    pictures: all("img").map((image) => image.complete && image.naturalWidth),
    headings: all("h2").map((heading) => heading.textContent),
    page: [inside.documentElement.scrollWidth, inside.documentElement.clientWidth],
    tables: all(".table").map((table) => [table.scrollWidth, table.clientWidth]),
  }})
}})</script>"""


def chromium(folder: Path, *arguments: str) -> str:
    """Runs it with a profile in a folder and returns what it prints; skips, or fails where a browser is required."""
    if CHROMIUM is None:
        missing = "Chromium is not installed: apt-get install -y --no-install-recommends chromium"
        if os.environ.get("ATTNSWAP_TEST_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    command = [CHROMIUM, *QUIET, *OFFLINE, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def looked_at(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """Opens a page and returns its text, headings, the widths of its pictures, and what is wider than its place."""
    # In a frame of the same origin, so that the page can be asked without being changed.
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(width=width, page=escape(page.read_text())))
    printed = chromium(folder, "--dump-dom", probe.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', printed, re.DOTALL)
    assert found, printed[-2000:]
    answer: dict[str, Any] = json.loads(unescape(found[1]))
    return answer
