"""One process of a tensor parallel forward: tensor_parallel_forward.py FOLDER SWAP... Prints what came of each."""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import attnswap


def main(folder: str, name: str) -> None:
    tokens = torch.arange(3, 15)[None]
    checkpoint = f"{folder}/{name}"
    expected = attnswap.from_pretrained(checkpoint)(tokens).logits
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, tp_plan="auto")
        found = f"differs by {float((model(tokens).logits - expected).abs().max().detach()):.1e}"
    except attnswap.AttnSwapError as error:
        found = f"{type(error).__name__}: {error}"
    os.write(1, f"{name} {found}\n".encode())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for swap in sys.argv[2:]:
        main(sys.argv[1], swap)
        dist.barrier()
    dist.destroy_process_group()
