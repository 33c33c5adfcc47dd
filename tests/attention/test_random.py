"""Random numbers by counter, and the noise of a swap that reads them."""

from typing import Any

import pytest
import torch

import attnswap
from attnswap.attention.random import philox, uniform_of
from tests.helpers.calls import short_blocks

WORD = 0xFFFFFFFF


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in Python's own integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        x, y = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (y >> 32) ^ b ^ k0, y & WORD, (x >> 32) ^ d ^ k1, x & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "first"),
    [
        ([0, 0, 0, 0], [0, 0], 0x6627E8D5),
        ([WORD] * 4, [WORD] * 2, 0x408F276D),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0], 0xD16CFE09),
    ],
)
def test_known_answers(counter: list[int], key: list[int], first: int):
    """Of the authors' own test (kat_vectors of Random123)."""
    assert philox_in_python(counter, key)[0] == first
    seed = torch.tensor(key[0] | (key[1] & 0x7FFFFFFF) << 32)
    ours = philox(tuple(torch.tensor(word) for word in counter), seed)
    assert int(ours) == philox_in_python(counter, [key[0], key[1] & 0x7FFFFFFF])[0]


def test_numbers_depend_on_their_place_alone():
    seed, queries, keys = torch.tensor(7), torch.arange(20), torch.arange(30)
    whole = uniform_of(seed, 2, 3, queries, keys)
    assert torch.equal(uniform_of(seed, 2, 3, queries[5:9], keys[11:]), whole[:, :, 5:9, 11:])
    assert torch.equal(uniform_of(seed, 1, 2, queries, keys), whole[:1, :2])
    assert len(whole.unique()) > 0.999 * whole.numel()
    assert not torch.equal(uniform_of(torch.tensor(8), 2, 3, queries, keys), whole)
    assert whole.min() > 0 and whole.max() < 1 and torch.equal(whole.float().double(), whole)


def test_numbers_are_uniform():
    drawn = uniform_of(torch.tensor(3), 4, 4, torch.arange(128), torch.arange(128)).flatten()
    share = torch.histc(drawn, 64, 0, 1) / len(drawn) * 64
    assert (share - 1).abs().max() < 5 * (64 / len(drawn)) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1])) < 4 / len(drawn) ** 0.5


def call(backend: str, seed: int | None, **options: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, 9, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    out = attnswap.attention(*leaves, "gumbel-softmax", is_causal=True, backend=backend, seed=seed, **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def test_noise_is_the_same_in_every_backend_and_when_blocks_are_computed_again():
    wanted = call("dense", 11)
    with short_blocks():
        for found, want in zip(call("chunked", 11), wanted, strict=True):
            assert (found - want).abs().max() < 1e-12
    assert (call("dense", 12)[0] - wanted[0]).abs().max() > 1e-2
    assert torch.equal(call("dense", 11)[0], wanted[0])


def test_without_a_seed_there_is_no_noise():
    cold = call("dense", None)[0]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    softmax = attnswap.attention(query / 0.7, key, value, "softmax", is_causal=True, backend="dense")
    assert (cold - softmax).abs().max() < 1e-12


def test_noise_follows_the_law_of_gumbel():
    """The key with the largest noisy score is drawn with softmax's probability."""
    score = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64)
    uniform = uniform_of(torch.tensor(5), 1, 64, torch.arange(512), torch.arange(4))
    winner = (score - (-uniform.log()).log()).argmax(-1).flatten()
    share = torch.bincount(winner, minlength=4) / len(winner)
    assert (share - score.softmax(0)).abs().max() < 4 * (0.25 / len(winner)) ** 0.5
