"""The process that compiles the kernels of one call: ``python -m attnswap.bench.compile_process JSON``.

It runs the call once, which leaves its kernels in the caches of Triton and Inductor.
"""

import json
import sys

import torch

from attnswap.bench.calls import build, draw_tensors
from attnswap.bench.cases import from_json
from attnswap.errors import first_line


def main() -> None:
    """Reads a job from the command line; ends with 1 and the reason on stderr if the call fails."""
    job = json.loads(sys.argv[1])
    case, setting = from_json(job)
    try:
        call = build(case, setting, draw_tensors(setting), job["backend"])
        with call.context():
            call()
        torch.accelerator.synchronize()
    except Exception as error:  # kernels and compilers raise errors of many types
        sys.exit(first_line(error))


if __name__ == "__main__":
    main()
