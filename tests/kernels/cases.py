"""The masks that every kernel must get right, odd ones first. Each takes the number of tokens."""

from __future__ import annotations

import torch

from ringflash import IntervalMask


def _zigzag(length: int, ranks: int, rank: int) -> torch.Tensor:
    """Positions of a rank that holds chunk `rank` and its mirror image of 2 x ranks chunks."""
    chunk = -(-length // (2 * ranks))
    mirror = 2 * ranks - 1 - rank
    return torch.cat([torch.arange(i * chunk, (i + 1) * chunk) for i in (rank, mirror)])


def _documents(length: int, seed: int) -> list[int]:
    """Documents of very different lengths, empty ones among them, that leave the last tokens to none."""
    cuts = torch.rand(6, generator=torch.Generator().manual_seed(seed)).mul(length).int().sort().values.tolist()
    return [end - begin for begin, end in zip([0, *cuts[:2], *cuts[1:]], [*cuts[:2], *cuts[1:]], strict=False)]


MASKS = {
    "no row sees anything": lambda n: IntervalMask.documents([0], n),
    "rows that see nothing among others": lambda n: (
        IntervalMask.documents([n // 5, n // 3], n) & IntervalMask.window(n, n // 6, 3)
    ),
    "one token": lambda n: IntervalMask.causal(1),
    "one query, many keys": lambda n: IntervalMask.causal(n).restrict(torch.tensor([n - 3]), torch.arange(n)),
    "many queries, two keys": lambda n: IntervalMask.causal(n).restrict(
        torch.arange(n), torch.tensor([n // 4, n // 2])
    ),
    "documents of one token": lambda n: IntervalMask.documents([1] * (n - 1), n),
    "documents that differ by batch row": lambda n: IntervalMask.documents([_documents(n, 1), _documents(n, 2)], n),
    "packed": lambda n: IntervalMask.documents([_documents(n, 3), _documents(n, 4)], n) & IntervalMask.causal(n),
    "packed, window": lambda n: (
        IntervalMask.documents([n // 4, n - n // 4 - 2], n) & IntervalMask.window(n, max(2, n // 9))
    ),
    "zigzag shard of the past": lambda n: IntervalMask.causal(2 * n).restrict(
        _zigzag(2 * n, 2, 1), _zigzag(2 * n, 2, 0)
    ),
    "zigzag shard of the future": lambda n: IntervalMask.causal(2 * n).restrict(
        _zigzag(2 * n, 2, 0), _zigzag(2 * n, 2, 1)
    ),
    "zigzag shard, window": lambda n: IntervalMask.window(3 * n, n).restrict(
        _zigzag(3 * n, 3, 2), _zigzag(3 * n, 3, 0)
    ),
    "striped shard": lambda n: IntervalMask.causal(4 * n).restrict(
        torch.arange(1, 4 * n, 4), torch.arange(2, 4 * n, 4)
    ),
    "shards that end in padding": lambda n: IntervalMask.causal(n).restrict(
        torch.arange(n // 2, n + 9), torch.arange(n // 3, n + 30)
    ),
    "window": lambda n: IntervalMask.window(n, n // 5),
    "window both ways": lambda n: IntervalMask.window(n, n // 7, n // 4),
    "prefix": lambda n: IntervalMask.prefix(n, n // 3),
    "chunked": lambda n: IntervalMask.chunked(n, max(1, n // 3)) & IntervalMask.causal(n),
    "full": lambda n: IntervalMask.full(n),
    "causal": lambda n: IntervalMask.causal(n),
}
