"""Run a recipe on any number of processes: accelerate launch recipes/train.py recipes/ssmax.yaml [key=value ...]."""

import sys

from attnswap.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
