"""One rank's work in the steps of a schedule: `Forward` and `Backward`.

Both hold the rank's tensors, the pass's receive buffers and, per section, the views that kernels are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.kernels import Kernel
from ringflash.partial import Partial, merge_sink
from ringflash.ring.execution import Memory
from ringflash.ring.plan import AttentionPlan, Hop
from ringflash.ring.schedule import OWN, RESULTS, Attend, Call, Schedule, Shape
from ringflash.ring.watchdog import Label


@dataclass(frozen=True, eq=False)
class Layer:
    """The settings that a layer's forward and backward share. name: for reports."""

    plan: AttentionPlan
    kernel: Kernel
    scale: float
    softcap: float | None
    centers_keys: bool
    keeps_residue: bool
    returns_lse: bool
    name: str

    def schedules(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Schedule, Schedule]:
        """The plan's schedules for all local ranks' tensors as attention gets them, after Ulysses's exchange."""
        batch = len(q) // len(self.plan.ring.local)
        return self.plan.schedules(Shape(batch, q.shape[2], k.shape[2], k.shape[3], v.shape[3], q.dtype))

    def own_sink(self, sink: Tensor) -> Tensor:
        """The entries of this rank's heads in a [Hq] tensor, as a view."""
        return sink if self.plan.ulysses is None else self.plan.ulysses.own(sink)


# Of each section: the hops, and of these the local ranks.
Hops = list[tuple[tuple[Hop, ...], ...]]


class _Pass:
    """The handling of keys in both passes. i: the local rank's index. k, v [B, S, Hkv, D]: its own.

    hops: those of each section.
    """

    def __init__(
        self, layer: Layer, schedule: Schedule, i: int, k: Tensor, v: Tensor, hops: Hops, memory: Memory
    ) -> None:
        self.layer, self.rank, self.memory, self.own = layer, layer.plan.ring.local[i], memory, (k, v)
        self.sections, self.streams = schedule.sections, schedule.streams
        self.hops = [[hop[i] for hop in of_section] for of_section in hops]
        self._keys: dict[tuple[str, int, int], tuple[Tensor, Tensor]] = {}

    def queries_of(self, section: int, query_heads: int) -> slice:
        """The query heads that share the section's KV heads."""
        group = query_heads // self.own[0].shape[2]
        begin, end = self.sections[section].heads
        return slice(begin * group, end * group)

    def lay_out_keys(self, step: Call) -> None:
        """Own keys and values in the layout for sending, [S, B, Hkv, D]: copied unless they already have it.

        The copy uses the buffer that receives nothing before hop 2, if it is large enough.
        """
        by_token = [x.transpose(0, 1) for x in self.own]
        if not all(x.is_contiguous() for x in by_token):
            copies = self.memory.get("keys 0", ())
            if not copies or len(copies[0]) < len(by_token[0]):
                copies = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in by_token]
            by_token = [copy[: len(x)].copy_(x) for copy, x in zip(copies, by_token, strict=True)]
        self.memory[OWN] = by_token

    def keys(self, step: Attend) -> tuple[Tensor, Tensor]:
        """k and v [B, rows, heads, D] of a step."""
        length = self.hops[step.section][step.hop].keys
        at = step.keys, step.section, length
        if at not in self._keys:
            section = self.sections[step.section]
            rows, heads = slice(section.rows.begin, section.rows.begin + length), slice(*section.heads)
            k, v = self.own if step.keys == OWN else (x.transpose(0, 1) for x in self.memory[step.keys])
            self._keys[at] = k[:, rows, heads], v[:, rows, heads]
        return self._keys[at]


class Forward(_Pass):
    """One rank's running (out, lse) over all keys. `results` are out in q's dtype and lse, fp32 [B, Hq, S].

    keeps_residue: whether `results` also has the rounding error of out, in q's dtype.
    """

    def __init__(
        self, layer: Layer, schedule: Schedule, i: int, tensors: tuple[Tensor, ...], sink: Tensor | None,
        keeps_residue: bool, memory: Memory,
    ) -> None:  # fmt: skip
        q, k, v = tensors
        hops = [layer.plan.forward_hops for _ in schedule.sections]
        super().__init__(layer, schedule, i, k, v, hops, memory)
        self.sink, self.keeps_residue = sink, keeps_residue
        self.out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
        self.query_heads = [self.queries_of(i, q.shape[2]) for i in range(len(self.sections))]
        self.q = [q[:, :, heads] for heads in self.query_heads]
        self.rounds = sink is not None or keeps_residue  # in `finish`; otherwise the last hop that sees a tile rounds
        self.state: dict[int, Partial] = {}  # by section
        self.results: tuple[Tensor, ...] = ()

    def attend(self, step: Attend) -> None:
        """Merge a hop into a section's state. Rows that no later hop sees go to out, unless `finish` rounds."""
        i, hop = step.section, self.hops[step.section][step.hop]
        out = None if self.rounds else self.out[:, :, self.query_heads[i]]
        for intervals, seen in zip(hop.intervals, hop.seen, strict=True):
            self.state[i] = self.layer.kernel.forward(
                self.q[i], *self.keys(step), intervals, scale=self.layer.scale, softcap=self.layer.softcap,
                carry=self.state.get(i), out=out, seen=seen,
            )  # fmt: skip

    def finish(self, step: Call) -> None:
        """Merge the sink, round out, and keep its rounding error. This frees the running results."""
        residue, lse = [torch.empty_like(self.out)] if self.keeps_residue else [], []
        for i, heads in enumerate(self.query_heads):
            state = self.state.pop(i)
            if self.sink is not None:
                merge_sink(state, self.sink[heads])
            if self.rounds:
                self.out[:, :, heads] = state.out
            for x in residue:
                x[:, :, heads] = state.out.sub_(self.out[:, :, heads])
            lse.append(state.lse)
        self.results = self.out, concatenate(lse, dim=1), *residue


@dataclass(frozen=True, eq=False)
class Saved:
    """The tensors that a rank's forward saves for its backward, and the gradient of out.

    With Ulysses, q, k, v, lse and residue have the ring shard's tokens and some heads; delta and dout have the model's
    tokens and all heads. dout has a contiguous last dimension.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor
    delta: Tensor
    dout: Tensor
    residue: Tensor | None = None


class Backward(_Pass):
    """One rank's dq, dk and dv. When complete, they are written to `results`, which have the shapes of q, k and v."""

    def __init__(
        self, layer: Layer, schedule: Schedule, i: int, saved: Saved, results: tuple[Tensor, ...], label: Label,
        memory: Memory,
    ) -> None:  # fmt: skip
        hops = [layer.plan.hops_of(section.rows) for section in schedule.sections]
        super().__init__(layer, schedule, i, saved.k, saved.v, hops, memory)
        self.saved, self.label = saved, label
        self.query_heads = [self.queries_of(i, saved.q.shape[2]) for i in range(len(self.sections))]
        self.of_queries: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] = []  # by section
        self.dq: list[Tensor] = []
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}  # by buffer
        self.results = results

    def prepare(self, step: Call) -> None:
        """Compute delta, also from the residue, and the keys' center; zero dq; make the views of every section."""
        saved, layer, ulysses = self.saved, self.layer, self.layer.plan.ulysses
        dout, delta = saved.dout, saved.delta
        if ulysses is not None:
            dout = ulysses.queries(dout, self.label.at("exchange of results' gradients"))
            delta = (
                ulysses.queries(delta.transpose(1, 2), self.label.at("exchange of delta")).transpose(1, 2).contiguous()
            )
        if saved.residue is not None:
            delta += layer.kernel.delta(saved.residue, dout)
        center, lse = None, saved.lse
        if layer.centers_keys:
            center, lse = layer.kernel.center(saved.q, saved.k, lse, scale=layer.scale)
        dq = torch.zeros(saved.q.shape, dtype=torch.float32, device=saved.q.device)
        self.delta = delta
        for section, of_q in zip(self.sections, self.query_heads, strict=True):
            of_k = None if center is None else center[:, :, slice(*section.heads)]
            self.of_queries.append((dout[:, :, of_q], saved.q[:, :, of_q], lse[:, of_q], delta[:, of_q], of_k))
            self.dq.append(dq[:, :, of_q])

    def attend(self, step: Attend) -> None:
        """Add a hop's gradients to a section, or write them if no other hop has any."""
        (dout, q, lse, delta, center), dq = self.of_queries[step.section], self.dq[step.section]
        for intervals in self.hops[step.section][step.hop].intervals:
            (k, v), (dk, dv) = self.keys(step), self.gradients(step.gradients, step.section)
            self.layer.kernel.backward(
                dout, q, k, v, lse, delta, intervals,
                scale=self.layer.scale, softcap=self.layer.softcap, dq=dq, dk=dk, dv=dv, center=center,
                calls=self.streams,
            )  # fmt: skip

    def gradients(self, buffer: str, section: int) -> tuple[Tensor, Tensor]:
        """dk and dv [B, rows, heads, D] in a section's buffer, to add to, or in the results, to write."""
        if buffer == RESULTS:
            return self.results[1], self.results[2]
        if buffer not in self._gradients:
            (x,), (begin, end), k = self.memory[buffer], self.sections[section].heads, self.own[0]
            batch, heads = k.shape[0], end - begin
            of_keys = batch * heads * k.shape[3]
            dk, dv = (
                side.unflatten(1, (batch, heads, -1)).transpose(0, 1) for side in (x[:, :of_keys], x[:, of_keys:])
            )
            self._gradients[buffer] = dk, dv
        return self._gradients[buffer]

    def round(self, step: Call) -> None:
        """Write a section's complete sums in the results' dtype, while the other stream's last kernel runs."""
        section, round_into = self.sections[step.section], self.layer.kernel.round_into
        rows, heads = slice(*section.rows), slice(*section.heads)
        if not section.written:
            own = self.gradients(section.gradients(self.rank, 0), step.section)
            for result, x in zip(self.results[1:], own, strict=True):
                round_into(result[:, rows, heads], x)
        if section.rows.begin == 0:
            dq = self.results[0][:, :, self.query_heads[step.section]]
            self.layer.kernel.round_dq(dq, self.dq[step.section], scale=self.layer.scale)

    def sink_gradient(self, sink: Tensor) -> Tensor:
        """p delta of the sink, fp32 [B, Hq, S] of this rank's heads. The gradient is minus its sum over queries.

        Rows that see nothing, with a sink of -inf, get 0: they have no softmax.
        """
        lse = self.saved.lse
        weight = torch.exp(sink.float()[:, None] - lse).masked_fill_(lse == -torch.inf, 0.0)
        return weight.mul_(self.delta)


def concatenate(parts: list[Tensor], dim: int = 0) -> Tensor:
    """The parts concatenated; a single part is returned as it is."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]
