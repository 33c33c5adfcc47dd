"""Reads the machine code of a compiled kernel: what its inner loop issues."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

KINDS = {
    "cuda": {
        "matrix": r"[HIQO]G?MMA|UTC\w*MMA",
        "special": r"MUFU",
        "float": r"(F(?!ENCE|LO)|HADD|HMUL|HFMA|HMNMX|HSET|D(?!EPBAR))\w*",
        "memory": r"(LD|ST|RED|ATOM|UTMA|UBLK)\w*",
    },
    "hip": {
        "matrix": r"v_mfma\w*",
        "special": r"v_(exp|log|rcp|rsq|sqrt)_\w*",
        "float": r"v_\w*(f32|f64|f16|bf16)\w*",
        "memory": r"(ds|global|flat|buffer|scratch|s_load)_\w*",
    },
}
"""Mnemonics by kind; all else is ``"other"``: integers, predicates, addresses, shuffles and barriers."""
PATTERNS = {
    "cuda": r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*(?P<name>[A-Z]\w*)(?:.*?`\((?P<target>\.\w+)\))?",
    "hip": r"^\s+(?P<name>[a-z]\w+)(?:\s+(?P<target>\.LBB\w+)\s*$)?",
}
"""An instruction: its mnemonic and the label that it names, if any."""


def listing(compiled: Any, backend: str) -> list[str]:
    """Returns the machine code of a kernel that Triton compiled, as lines with labels."""
    if backend == "hip":
        return str(compiled.asm["amdgcn"]).splitlines()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def inner_loop(lines: list[str], backend: str) -> dict[str, int]:
    """Counts the instructions of the loop over tiles by the names of :data:`KINDS`.

    A kernel may have several such loops. Of those with the most products, it is the shortest: tiles without a mask.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif (found := re.match(PATTERNS[backend], line)) and found["name"] not in ("NOP", "s_nop"):
            code.append(_kind(found["name"], backend))
            if found["target"] in labels:
                loops.append((labels[found["target"]], len(code)))
    product = "matrix" if "matrix" in code else "float"  # exact fp32 products are made of multiply-adds
    counts = {loop: Counter(code[slice(*loop)]) for loop in loops}
    counts = {loop: count for loop, count in counts.items() if count[product]}
    innermost = [
        count
        for (start, end), count in counts.items()
        if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in counts)
    ]
    most = max(count[product] for count in innermost)
    # The masks of exact fp32 products add to their multiply-adds, so that a few less are as many.
    shortest = min((c for c in innermost if c[product] >= 0.8 * most), key=Counter.total)
    return {kind: shortest[kind] for kind in (*KINDS[backend], "other")}


def _kind(name: str, backend: str) -> str:
    return next((kind for kind, pattern in KINDS[backend].items() if re.fullmatch(pattern, name)), "other")
