"""What is subtracted from the keys in the backward, and the lse that belongs to the difference."""

from __future__ import annotations

import pytest
import torch

from ringflash.kernels import compensation


@pytest.mark.parametrize(
    ("keys", "used"),
    [
        (torch.randn(1, 300, 1, 64) + 1, True),
        (torch.randn(1, 300, 1, 64), False),
        (torch.ones(1, 300, 1, 64), True),
        (torch.randn(1, 3000, 1, 64) + 0.4, True),  # of which every twelfth is looked at
        (torch.randn(1, 300, 1, 64) + torch.inf, False),
        (torch.randn(1, 7, 1, 64) / 100 + 1, False),
    ],
    ids=["mean 1", "mean 0", "all alike", "long", "infinite", "few keys"],
)
def test_a_mean_is_used_where_it_is_no_chance(keys, used):
    q = torch.randn(1, keys.shape[1], 3, 64).half()
    c, _ = compensation.center(q, keys.half(), torch.zeros(1, 3, keys.shape[1]), scale=64**-0.5)
    assert c.shape == (1, 1, 1, 64)
    assert bool(c.any()) == used
    if used:
        mean = keys[:, :: compensation.sampling(keys.shape[1])[0]].mean(1, keepdim=True)
        assert ((c - mean).abs() <= mean.abs() / 8)[c != 0].all()  # 3 bits: one of 0.5, 0.625, ... 1, and so on


def test_the_shifted_lse_is_that_of_the_centered_keys():
    q, k = torch.randn(2, 40, 6, 32), torch.randn(2, 40, 3, 32) + torch.tensor([0.0, 1.0, -2.0])[:, None]

    def lse_of(keys: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("bshd,bthd->bhst", q.double(), keys.double().repeat_interleave(2, 2))
        return (0.3 * scores).logsumexp(-1)

    c, lse = compensation.center(q, k, lse_of(k).float(), scale=0.3)
    assert [bool(head.any()) for head in c.transpose(0, 2)] == [False, True, True]
    torch.testing.assert_close(lse.double(), lse_of(k - c), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 255, 256, 257, 1000, 131072])
def test_samples_are_evenly_spaced_and_no_more_than_are_looked_at(rows):
    step, count = compensation.sampling(rows)
    assert len(range(0, rows, step)) == count <= compensation.SAMPLED
    assert count * 2 >= min(rows, compensation.SAMPLED)
