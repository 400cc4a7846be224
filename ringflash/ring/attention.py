"""ring_attention: exact attention over a sequence sharded across ranks.

Forward. Keys and values travel round the ring; the queries stay, with their running (out, lse), which each hop's
kernel carries in and updates. While hop s is computed, the keys of hop s + 1 are on their way. Heads are computed in
two halves, each on a stream of its own (`ring.streams`):

    rank r      compute   | own keys      | keys of r - 1 | keys of r - 2 | ...
                transfer  | keys of r - 1 | keys of r - 2 | keys of r - 3 | ...

Backward. delta = rowsum(dout * out) and the global lse make each block's gradient independent of the others. Keys and
values go round again; their gradients follow in fp32, one hop behind, added to by each rank's kernel. A rank computes
its own keys last, adding to the gradients that have returned. One half's gradients are on their way while the
kernel adds to the other's:

    rank r      compute   | hop s, half 0          | hop s, half 1              | hop s + 1, half 0 ...
                transfer  | dk, dv of half 1, s-1  | dk, dv of half 0, s        | dk, dv of half 1, s ...

Only what later ranks see is sent (`plan.routes`). Extra memory, whatever the ring's size:

- two shards of keys and values, and in the forward the running result in fp32;
- in the backward also two shards of gradients, and the kernel's centered keys (`kernels.compensation`);
- a third shard of gradients where a rank's own return while it still forwards those of others, as with documents, wide
  windows or contiguous layouts.

With one KV head there are no halves of the heads. The two parts are then a quarter of the keys, and the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringflash import kernels
from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.partial import Partial, merge_sink
from ringflash.ring.checks import check_call, check_tensors
from ringflash.ring.plan import AttentionPlan, Part
from ringflash.ring.ranges import Range, Ranges
from ringflash.ring.recompute import kept_or_computed
from ringflash.ring.streams import Streams
from ringflash.ring.transport import Allocate, Loopback, Message, Transfer


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    compensated: bool = True,
    layer: int | None = None,
) -> Tensor:
    """Attention of this rank's queries over the whole sequence, differentiable.

    q [B, S, Hq, D]; k, v [B, S, Hkv, D], where S is the layout's shard length and Hq a multiple of Hkv; fp16, bf16 or
    fp32; any strides with a contiguous last dimension. With a Loopback ring, B is ranks x batch, ranks outermost.
    scale, above 0, defaults to D ** -0.5. sink [Hq], differentiable: for each head a logit that takes part in the
    softmax and has no value (gpt-oss), not capped. deterministic: gradients are bit-equal from run to run, more slowly
    on Hopper. compensated: gradients do not suffer from out's rounding (see `kernels.compensation`).
    layer: its number, for reports of a ring that hangs. Returns out [B, S, Hq, D] in q's dtype; queries that
    see nothing get 0.
    Raises ValueError or TypeError naming the argument that does not fit, or the reason why no kernel takes it.
    """
    check_call(q, k, v, plan, scale, softcap, sink, deterministic=deterministic, compensated=compensated)
    if not len(q):  # no batch rows, on any rank: nothing to compute or send
        return q + 0 * sum(x.sum().to(q.dtype) for x in (k, v, sink) if x is not None)
    call = _Call(
        plan=plan,
        kernel=kernels.select(q, k, softcap, kernel, deterministic),
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        centers_keys=compensated and softcap is None and sink is None,
        keeps_residue=compensated and q.dtype != torch.float32 and not (softcap is None and sink is None),
        layer="attention" if layer is None else f"layer {layer}",
    )
    with torch.autocast(q.device.type, enabled=False):  # what is fp32 here is so for a reason
        return _RingAttention.apply(q, k, v, sink, call)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    kernel: str = "auto",
    deterministic: bool = False,
    compensated: bool = True,
) -> Tensor:
    """Attention on one device under any IntervalMask: ring_attention on a ring of one. Same arguments and errors."""
    check_tensors(q=q, k=k, v=v)
    if not isinstance(mask, IntervalMask):
        raise TypeError(f"mask must be an IntervalMask, such as IntervalMask.causal(tokens), got {mask!r:.100}")
    plan = AttentionPlan(mask, Layout.contiguous(mask.queries, 1), Loopback(1, q.device))
    return ring_attention(
        q, k, v, plan, scale=scale, softcap=softcap, sink=sink, kernel=kernel,
        deterministic=deterministic, compensated=compensated,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Call:
    """What a layer's forward and backward share, apart from tensors."""

    plan: AttentionPlan
    kernel: kernels.Kernel
    scale: float
    softcap: float | None
    centers_keys: bool
    keeps_residue: bool
    layer: str

    def own_sink(self, sink: Tensor | None) -> Tensor | None:
        """The part of a [Hq] tensor that this rank's heads have, as a view."""
        return sink if sink is None or self.plan.ulysses is None else self.plan.ulysses.own(sink)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, call: _Call) -> Tensor:
        kv_heads = k.shape[2]
        ranks, ulysses = len(call.plan.ring.local), call.plan.ulysses
        context = f"{call.layer}, forward"
        if ulysses is not None:
            q = ulysses.queries(q, f"{context}, exchange of queries")
            k, v = (ulysses.keys(x, f"{context}, exchange of {what}") for x, what in ((k, "keys"), (v, "values")))

        def compute() -> tuple[Tensor, ...]:
            q_, k_, v_ = (_by_rank(x, ranks) for x in (q, k, v))
            with call.plan.ring.receive_buffers(context) as allocate:
                kv = _TravellingKeys(call.plan, k_, v_, context, allocate)
                results = _forward(q_, kv, call.own_sink(sink), call.keeps_residue and any(ctx.needs_input_grad), call)
            out, *kept = (_together(list(parts)) for parts in zip(*results, strict=True))
            return out if ulysses is None else ulysses.tokens(out, f"{context}, exchange of results"), *kept

        out, *kept = kept_or_computed(compute, travels=call.plan.ring.size > 1 or ulysses is not None)
        ctx.save_for_backward(q, k, v, sink, out, *kept)
        ctx.call, ctx.kv_heads = call, kv_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        context = f"{ctx.call.layer}, backward"
        with torch.autocast(dout.device.type, enabled=False), ctx.call.plan.ring.receive_buffers(context) as allocate:
            return *_gradients(ctx, dout, context, allocate), None


def _gradients(ctx, dout: Tensor, context: str, allocate: Allocate) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Those of q, k, v and the sink."""
    q, k, v, sink, out, lse, *residue = ctx.saved_tensors
    ranks, ulysses = len(ctx.call.plan.ring.local), ctx.call.plan.ulysses
    q_, k_, v_, lse_ = (_by_rank(x, ranks) for x in (q, k, v, lse))
    kv = _TravellingKeys(ctx.call.plan, k_, v_, context, allocate)
    kv.send_for(1)  # own keys come last, so what follows is all there is to hide this behind
    # out is where the model's tokens are; everything else is where attention was computed.
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = ctx.call.kernel.delta(out, dout)
    if ulysses is not None:
        dout = ulysses.queries(dout, f"{context}, exchange of results' gradients")
        delta = ulysses.queries(delta.transpose(1, 2), f"{context}, exchange of delta").transpose(1, 2).contiguous()
    for rounded_away in residue:
        delta += ctx.call.kernel.delta(rounded_away, dout)
    exact = torch.float32 if ulysses is not None else q.dtype  # Ulysses sums gradients over its ranks
    centers = None
    if ctx.call.centers_keys:
        center, shifted = ctx.call.kernel.center(q, k, lse, scale=ctx.call.scale)
        centers, lse_ = _by_rank(center, ranks), _by_rank(shifted, ranks)
    dq, dk, dv = _backward(
        _by_rank(dout, ranks), q_, kv, lse_, _by_rank(delta, ranks), centers, exact, ctx.call, allocate
    )
    dsink = None
    if sink is not None:
        # As for a key whose value is 0: p (dout . 0 - delta), summed over its queries. Where nothing is seen and the
        # sink is -inf too, there is no softmax.
        weight = torch.exp(ctx.call.own_sink(sink).float()[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)
        dsink = torch.zeros_like(sink)
        ctx.call.own_sink(dsink).copy_(-(weight * delta).sum((0, 2)))
    if ulysses is not None:
        dq = ulysses.tokens(dq.to(q.dtype), f"{context}, exchange of queries' gradients")
        dk = ulysses.key_gradients(dk, ctx.kv_heads, f"{context}, exchange of keys' gradients")
        dv = ulysses.key_gradients(dv, ctx.kv_heads, f"{context}, exchange of values' gradients")
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsink


def _forward(
    q: list[Tensor], kv: _TravellingKeys, sink: Tensor | None, keeps_residue: bool, call: _Call
) -> list[tuple[Tensor, ...]]:
    """(out, lse) over all keys, and the sink, for each local rank; out in q's dtype.

    keeps_residue: also what rounding took from out, in q's dtype.
    """
    plan = call.plan
    halves = _halves(q[0].shape[2], kv.own[0][0].shape[2], plan)
    state: list[list[Partial | None]] = [[None] * len(halves) for _ in q]  # hop 0, always computed, fills it
    last = [plan.computed(i)[-1] for i in range(len(q))]
    out = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in q]
    stays_exact = sink is not None or keeps_residue

    def add(s: int, i: int, stream: int) -> None:
        """Merge hop s into local rank i's state, for some of the heads; the last one's result is that part of out.

        Where a sink or the residue is to come, it stays in fp32.
        """
        of_q, of_k = halves[stream]
        hop = plan.hops[s][i]
        for intervals in hop.intervals:
            k_here, v_here = kv.at(s, i)
            final = s == last[i] and intervals is hop.intervals[-1]
            state[i][stream] = call.kernel.forward(
                q[i][:, :, of_q], k_here[:, :, of_k], v_here[:, :, of_k], intervals,
                scale=call.scale, softcap=call.softcap, carry=state[i][stream],
                out=out[i][:, :, of_q] if final and not stays_exact else None,
            )  # fmt: skip

    with Streams(len(halves), plan.ring.device) as streams:
        for s in range(plan.ring.size):
            kv.arrive()
            streams.fork()
            with streams.on(streams.last):  # here both are done with hop s - 1, whose buffer this fills
                kv.send_for(s + 1)
            for stream in range(len(halves)):
                with streams.on(stream):
                    for i in range(len(q)):
                        add(s, i, stream)
    residue = [torch.empty_like(x) for x in out] if keeps_residue else []
    for i, heads in enumerate(state if stays_exact else []):
        for half, (of_q, _) in zip(heads, halves, strict=True):
            if sink is not None:
                merge_sink(half, sink[of_q])  # type: ignore[arg-type]
            out[i][:, :, of_q] = half.out  # type: ignore[union-attr]
            if keeps_residue:
                residue[i][:, :, of_q] = half.out.sub_(out[i][:, :, of_q])  # type: ignore[union-attr]
    lse = [_together([half.lse for half in heads], dim=1) for heads in state]  # type: ignore[union-attr]
    streams.fork()  # stream 1's memory was read here, and may be given out there as soon as this returns
    return list(zip(*(results for results in (out, lse, residue) if results), strict=True))


def _backward(
    dout: list[Tensor],
    q: list[Tensor],
    kv: _TravellingKeys,
    lse: list[Tensor],
    delta: list[Tensor],
    centers: list[Tensor] | None,
    dtype: torch.dtype,
    call: _Call,
    allocate: Allocate,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in `dtype`, of all local ranks, ranks outermost in the batch.

    centers: what each local rank subtracts from all keys; lse is of those (`kernels.compensation`). The keys of hop 1
    are on their way.
    """
    plan, k = call.plan, [own for own, _ in kv.own]
    dq = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in q]
    whole = [[torch.empty(x.shape, dtype=dtype, device=x.device) for x in xs] for xs in (q, k, k)]
    halves = _halves(q[0].shape[2], k[0].shape[2], plan)
    parts = [
        (stream, _TravellingGradients(plan, part, k, of_k, kv.context, allocate), part, of_q, of_k)
        for stream, (of_q, of_k) in enumerate(halves)
        for part in _parts(plan, len(halves))
    ]

    def add(s: int, i: int, dkv: _TravellingGradients, part: Part, of_q: slice, of_k: slice) -> None:
        """What hop s gives local rank i, for some of the heads or keys."""
        hop = part.hops[s][i]
        if not hop.intervals:
            return
        (dk, dv), (k_here, v_here) = dkv.at(s, i), (x[:, part.rows, of_k] for x in kv.at(s, i))
        center = None if centers is None else centers[i][:, :, of_k]
        for intervals in hop.intervals:
            call.kernel.backward(
                dout[i][:, :, of_q], q[i][:, :, of_q], k_here, v_here,
                lse[i][:, of_q], delta[i][:, of_q], intervals,
                scale=call.scale, softcap=call.softcap, dq=dq[i][:, :, of_q], dk=dk, dv=dv,
                center=center,
            )  # fmt: skip

    hops = [*range(1, plan.ring.size), 0]
    for (
        _,
        dkv,
        *_,
    ) in parts:  # here the first keys' way hides it; on a stream it would wait for the other's kernel to end
        dkv.arrive(hops[0])
    with Streams(len(halves), plan.ring.device) as streams:  # parts of the keys add to the same dq, one after another
        for s in hops:
            kv.arrive()
            streams.fork()
            if s > 0:
                with streams.on(streams.last):  # as in the forward
                    kv.send_for(s + 1)
            for stream, dkv, part, of_q, of_k in parts:
                with streams.on(stream):
                    if s != hops[0]:
                        dkv.arrive(s)
                    for i in range(len(q)):
                        add(s, i, dkv, part, of_q, of_k)
                    if s > 0:
                        dkv.send_after(s)
        for stream, dkv, part, of_q, of_k in parts:
            with streams.on(stream):  # of the half that is done first, under the other's last kernel
                for i, (into_q, *into_kv) in enumerate(zip(*whole, strict=True)):
                    for into, x in zip(into_kv, dkv.at(0, i), strict=True):
                        call.kernel.round_into(into[:, part.rows, of_k], x)
                    if part.rows.start == 0:
                        call.kernel.round_into(into_q[:, :, of_q], dq[i][:, :, of_q])
    return _together(whole[0]), _together(whole[1]), _together(whole[2])


class _TravellingKeys:
    """Keys and values of every hop: a rank's own, and two buffers that take turns in receiving and sending on.

    Those of hop s lie in buffer s % 2, [S, B, Hkv, D], so that a run of tokens is contiguous. Own keys that do not lie
    like that are copied into buffer 0, which receives nothing before hop 2.
    """

    def __init__(self, plan: AttentionPlan, k: list[Tensor], v: list[Tensor], context: str, allocate: Allocate) -> None:
        self.plan, self.own, self.context = plan, list(zip(k, v, strict=True)), context
        self.buffers: tuple[list[list[Tensor]], ...] = ([], [])  # two, of each local rank, of keys and of values
        self.leaving: list[list[Tensor]] = []  # own keys and values, as they are sent
        self.transfer: Transfer | None = None
        if not any(route.last_hop for route in plan.routes):
            return
        for i, pair in enumerate(self.own):
            by_token = [x.transpose(0, 1) for x in pair]
            for parity, buffers in enumerate(self.buffers):
                buffers.append([allocate(x.shape, x.dtype) for x in by_token] if plan.arrives[parity] else [])
                self._clear_unwritten(parity, i)
            if not all(x.is_contiguous() for x in by_token):
                into = self.buffers[0][i] or [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in by_token]
                by_token = [copy.copy_(x) for copy, x in zip(into, by_token, strict=True)]
            self.leaving.append(by_token)

    def _clear_unwritten(self, parity: int, i: int) -> None:
        """Zero what the first message into a buffer leaves as it is.

        A kernel's tiles reach over the edge of a run, and 0 times what is there must be 0.
        """
        received_for = range(2 - parity, self.plan.ring.size, 2)
        first = next(filter(None, (self._coming(s, i) for s in received_for)), None)
        if first is not None:
            for buffer in self.buffers[parity][i]:
                _clear(buffer, _all(buffer).without(first))

    def _coming(self, s: int, i: int) -> Ranges:
        """The tokens that local rank i receives with hop s."""
        ring = self.plan.ring
        return self.plan.routes[(ring.local[i] - s) % ring.size].keys[s]

    def send_for(self, s: int) -> None:
        """Send what hop s needs, from where it is on hop s - 1."""
        ring = self.plan.ring
        if s == ring.size or not self.leaving:
            return
        outgoing, incoming = [], []
        for i, rank in enumerate(ring.local):
            here = self.leaving[i] if s == 1 else self.buffers[(s - 1) % 2][i]
            into = self.buffers[s % 2][i]
            leaving, coming = self.plan.routes[(rank - s + 1) % ring.size].keys[s], self._coming(s, i)
            outgoing += [
                Message(rank, (rank + 1) % ring.size, x[slice(*r)], target[slice(*r)])
                for r in leaving
                for x, target in zip(here, into, strict=True)
            ]
            incoming += [Message((rank - 1) % ring.size, rank, x[slice(*r)]) for r in coming for x in into]
        self.transfer = ring.exchange(outgoing, incoming, f"{self.context}, hop {s}")

    def arrive(self) -> None:
        """Wait for what is under way, if anything is; it is then here."""
        if self.transfer is not None:
            self.transfer.wait()
            self.transfer = None

    def at(self, s: int, i: int) -> tuple[Tensor, Tensor]:
        """k and v [B, S, Hkv, D] of local rank i on hop s, if it computes anything on it."""
        if s == 0:
            return self.own[i]
        k, v = (x.transpose(0, 1) for x in self.buffers[s % 2][i])
        return k, v


class _TravellingGradients:
    """dk and dv of some KV heads and keys, fp32: they follow their keys one hop behind, then return to the keys' rank.

    Two buffers [rows, 2, B, heads, D] a rank take turns: one is added to and sent while the other receives. Own
    gradients return into the latter, too; into memory apart where any rank still has others' to pass on by then.
    """

    def __init__(
        self, plan: AttentionPlan, part: Part, k: list[Tensor], heads: slice, context: str, allocate: Allocate
    ) -> None:
        self.routes, self.ring, self.context = part.routes, plan.ring, context
        batch, _, _, dim = k[0].shape
        length, count = part.rows.stop - part.rows.start, heads.stop - heads.start
        travels = any(route.last_hop for route in part.routes)

        def buffers() -> list[Tensor]:
            return [allocate((length, 2, batch, count, dim), torch.float32) for _ in k]

        self.buffers = [buffers() for _ in range(2 if travels else 1)]
        self.home = buffers() if part.returned_early else None
        self.transfer: Transfer | None = None

    def _lie(self, rank: int, s: int) -> list[Tensor]:
        """Where a rank's part of hop s's gradients lies, by local rank: the same on all ranks, seen from any.

        Its own, of hop 0, stay in the buffer whose turn it is when they come, where nothing follows them there.
        """
        if s > 0 or self.home is None:
            return self.buffers[(s or self.routes[rank].first_return + 1) % len(self.buffers)]
        return self.home

    def arrive(self, s: int) -> None:
        """Have the gradients of hop s's keys here, with zeros where a kernel adds for the first time."""
        if self.transfer is not None:
            self.transfer.wait()
            self.transfer = None
        for i, rank in enumerate(self.ring.local):
            route, here = self.routes[(rank - s) % self.ring.size], self._lie(rank, s)[i]
            came = route.forwarded[s - 1] if s > 0 else route.all_returned
            _clear(here, (route.gradients[s] if s > 0 else _all(here)).without(came))

    def send_after(self, s: int) -> None:
        """Send on what hop s added to: to the next rank what that one's hop adds to, the rest home."""
        size, routes = self.ring.size, self.routes
        outgoing, incoming = [], []
        for i, rank in enumerate(self.ring.local):
            x, here, after, before = self._lie(rank, s)[i], (rank - s) % size, (rank + 1) % size, (rank - 1) % size
            for to, hop, ranges in ((after, s + 1, routes[here].forwarded[s]), (here, 0, routes[here].returned[s])):
                target = self._lie(to, hop)[i]
                outgoing += [Message(rank, to, x[slice(*r)], target[slice(*r)]) for r in ranges]
            for source, hop, ranges in (
                (before, s + 1, routes[(before - s) % size].forwarded[s]),
                ((rank + s) % size, 0, routes[rank].returned[s]),
            ):
                incoming += [Message(source, rank, self._lie(rank, hop)[i][slice(*r)]) for r in ranges]
        self.transfer = self.ring.exchange(outgoing, incoming, f"{self.context}, gradients of hop {s}")

    def at(self, s: int, i: int) -> tuple[Tensor, Tensor]:
        """dk and dv [B, S, heads, D] of hop s and local rank i, to add to."""
        dk, dv = self._lie(self.ring.local[i], s)[i].transpose(0, 2).unbind(1)
        return dk, dv


def _all(x: Tensor) -> Ranges:
    """Every row of x."""
    return Ranges([Range(0, len(x))])


def _clear(x: Tensor, ranges: Ranges) -> None:
    """Zero the rows of x that are in runs."""
    for begin, end in ranges:
        x[begin:end].zero_()


def _by_rank(x: Tensor, ranks: int) -> list[Tensor]:
    """The local ranks' parts of a batch, as views."""
    return list(x.chunk(ranks)) if ranks > 1 else [x]


def _together(parts: list[Tensor], dim: int = 0) -> Tensor:
    """The parts as one tensor; a single one as it is."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _halves(query_heads: int, heads: int, plan: AttentionPlan) -> list[tuple[slice, slice]]:
    """(query heads, KV heads) of each half; one part where nothing travels or there is one KV head."""
    group, middle = query_heads // heads, heads // 2
    parts = [slice(0, middle), slice(middle, heads)] if plan.ring.size > 1 and heads > 1 else [slice(0, heads)]
    return [(slice(part.start * group, part.stop * group), part) for part in parts]


def _parts(plan: AttentionPlan, halves: int) -> list[Part]:
    """All keys; or, where heads come in one part, two parts of the keys, one's gradients to travel under the other.

    A quarter: under zigzag a hop sees the first half of the keys or all of them, and so something of both parts.
    """
    length = plan.layout.shard_length
    if halves > 1 or plan.ring.size == 1 or length < 2:
        return [plan.part(0, length)]
    quarter = max(1, length // 4)
    return [plan.part(0, quarter), plan.part(quarter, length)]
