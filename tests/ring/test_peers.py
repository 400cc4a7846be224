"""Copies land where the other rank looks for them; what the copy engines do is in test_gpus."""

import math
from contextlib import nullcontext

import pytest
import torch

from ringflash import AttentionPlan, IntervalMask, Layout, ring_attention
from ringflash.kernels import Kernel, blocked
from ringflash.partial import Partial
from ringflash.ring import attention
from ringflash.ring.transport import Message


class Noting:
    """One rank, whose inbox has numbered blocks: what it sends and receives, by exchange."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.local, self.device = size, (rank,), torch.device("cpu")
        self.blocks: list[torch.Tensor] = []
        self.sizes: list[int] = []
        self.sent: list[list[tuple]] = []
        self.received: list[list[tuple]] = []

    def inbox(self):
        self.blocks = []

        def empty(shape, dtype):
            self.sizes.append(math.prod(shape) * dtype.itemsize)
            self.blocks.append(torch.zeros(shape, dtype=dtype))
            return self.blocks[-1]

        return nullcontext(empty)

    def place(self, message: Message, x: torch.Tensor) -> tuple:
        """Who sends to whom, the number of the block where it lands, the place in there."""
        storages = [block.untyped_storage()._cdata for block in self.blocks]
        number = storages.index(x.untyped_storage()._cdata)
        offset = x.data_ptr() - self.blocks[number].data_ptr()
        return message.source, message.destination, number, offset, x.nbytes

    def exchange(self, outgoing, incoming, about):
        for message in outgoing:
            assert message.lands.shape == message.tensor.shape
        self.sent.append([self.place(m, m.lands) for m in outgoing])
        self.received.append([self.place(m, m.tensor) for m in incoming])
        return self

    def wait(self) -> None:
        pass


def forward(q, k, v, intervals, *, carry, out, **options) -> Partial:
    state = Partial.identity(q) if carry is None else carry
    return state if out is None else Partial(out.zero_(), state.lse)


def noted(mask, layout, rank, kv_heads, batch) -> Noting:
    ring = Noting(layout.ranks, rank)
    plan = AttentionPlan(mask, layout, ring)
    shapes = [(batch, layout.shard_length, heads, 4) for heads in (2 * kv_heads, kv_heads, kv_heads)]
    q, k, v = (torch.zeros(shape, dtype=torch.float16, requires_grad=True) for shape in shapes)
    ring_attention(q, k, v, plan).sum().backward()
    return ring


MASKS = {
    "causal": (IntervalMask.causal, "zigzag"),
    "causal, contiguous": (IntervalMask.causal, "contiguous"),
    "full": (IntervalMask.full, "striped"),
    "window": (lambda n: IntervalMask.window(n, left=n // 10), "contiguous"),
    "documents": (lambda n: IntervalMask.causal(n) & IntervalMask.documents([n // 8, n // 2], n), "zigzag"),
    "documents, balanced": (lambda n: IntervalMask.causal(n) & IntervalMask.documents([n // 8, n // 2], n), "balanced"),
}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_sent_lands_where_the_other_rank_has_it_come(monkeypatch, name, ranks):
    kernel = Kernel(
        "none", forward, lambda out, dout: out.sum(-1).transpose(1, 2).float(), lambda *args, **options: None,
        blocked.round_into, lambda *args: None,
    )  # fmt: skip
    monkeypatch.setattr(attention.kernels, "select", lambda *args: kernel)
    make, layout = MASKS[name]
    mask = make(64 * ranks)
    layout = Layout.of(layout, mask, ranks) if layout == "balanced" else Layout.named(layout, 64 * ranks, ranks)
    for kv_heads, batch in ((2, 1), (1, 2)):
        rings = [noted(mask, layout, rank, kv_heads, batch) for rank in range(ranks)]
        assert all(ring.sizes == rings[0].sizes for ring in rings)  # so the n-th block is known to all by its number
        for exchange in zip(*(ring.sent for ring in rings), *(ring.received for ring in rings), strict=True):
            sent, received = (
                sorted(place for places in side for place in places) for side in (exchange[:ranks], exchange[ranks:])
            )
            assert sent == received
        assert any(any(ring.sent) for ring in rings)
