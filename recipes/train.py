"""Run a recipe on any number of processes: accelerate launch recipes/train.py recipes/ssmax.yaml [key=value ...]"""

from attnswap.cli.train import main

if __name__ == "__main__":
    main()
