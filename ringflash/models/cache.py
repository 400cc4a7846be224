"""RingCache: the KV cache of a model on the ring that generates, on one device or with the document sharded over ranks.

    cache = RingCache(model, capacity=131_072, ring=ring)   # or without ring: one device
    prefill(model, document, cache)                         # int64 [B, N], the same on every rank; each reads its share
    model.generate(torch.cat([document, prompt], dim=1), past_key_values=cache, max_new_tokens=100)

`generate` computes the tokens that the cache does not hold yet, the same ones on every rank, and attends to all others
on the ranks that hold them (`ring.decode`). Without `prefill`, every rank reads the whole prompt in `generate`;
transformers' `prefill_chunk_size` limits the memory of that. To sample, give all ranks the same random numbers
(torch.manual_seed). Ranks compare the tokens of each forward, and raise an error if they differ. For a single token,
such as a sample, the next forward raises it, so that decoding does not wait for the comparison.

    state = cache.snapshot()        # of the document
    ...                             # generate
    cache.restore(state)            # for another prompt on the same document

A layer with a sliding window keeps only its window. transformers does not pass the cache to attention functions.
`update` therefore records cache and layer for the attention of that layer, which runs next, stores the keys and
attends.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ringflash.kernels import FASTEST_FIRST
from ringflash.kernels.checks import OUT_DTYPES
from ringflash.layout import Layout
from ringflash.mask import check_tokens
from ringflash.models.checks import tokens_of_call
from ringflash.models.configuration import refusal
from ringflash.models.families import has_chunks
from ringflash.models.layers import calls_per_layer, layer_kinds, state_heads
from ringflash.models.rope_length import is_length_aware, length_refusal
from ringflash.ring.cache_plan import CHUNK, CachePlan, CacheState, rows_for
from ringflash.ring.collectives import checksum, comparison
from ringflash.ring.decode import Attention, DeviceStep, LayerCache, attention_on_device, cached_attention
from ringflash.ring.transport import Loopback, ProcessRing, Ring

_ALL_COMPUTE = "each computes all new tokens, and samples the same ones after the same torch.manual_seed"
_pending: ContextVar[tuple[RingCache, int] | None] = ContextVar("pending", default=None)


def pop_pending() -> tuple[RingCache, int] | None:
    """The cache and layer that the last `update` left for the attention that runs now, or None. Clears them."""
    pending = _pending.get()
    _pending.set(None)
    return pending


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A RingCache's state at some time; for layers with windows also keys and values, [layer][k or v][local rank]."""

    plan: CacheState
    windowed: dict[int, tuple[list[Tensor], list[Tensor]]]


class RingCache(Cache):
    """Keys and values of up to `capacity` tokens per batch row, reserved at the first forward and shared by `ring`.

    - model: a causal language model with attn_implementation="ring".
    - capacity: the largest number of tokens per batch row: a document with its prompt and answer.
    - ring: the ranks that share the cache; None for the model's device alone.
    - chunk: the largest number of tokens, over all ranks, that attention and a forward of `prefill` take at once; 2 per
      rank or more.
    - kernel: for long prompts, as in `ring_attention`; few new tokens use flash_decode, or plain torch with
      kernel="blocked".
    - rope_length: if RoPE depends on a document's length (`rope_per_document`), the length whose frequencies all keys
      get, capacity or more; None: capacity, which must then not exceed the model's original length.

    `nbytes` is the memory on this process per batch row. Raises ValueError or TypeError for what does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        *,
        ring: Ring | None = None,
        chunk: int = CHUNK,
        kernel: str = "auto",
        rope_length: int | None = None,
    ) -> None:
        self.config: Any = _checked(model)
        self.ring: Ring = Loopback(1, model.device) if ring is None else ring
        if not hasattr(self.ring, "exchange") or isinstance(self.ring, type):
            raise TypeError(f"ring must be None, a ProcessRing or a Loopback, got {ring!r:.100}")
        if kernel not in ("auto", *FASTEST_FIRST):
            raise ValueError(f"kernel={kernel} is not one of auto, {', '.join(FASTEST_FIRST)}")
        self.capacity, self.kernel = check_tokens("capacity", capacity, least=1), kernel
        self.chunk = check_tokens("chunk", chunk, least=2 * self.ring.size)
        per_document = rope_length is not None and is_length_aware(model)
        if reason := length_refusal(self.config, self.capacity, model, per_document):
            raise ValueError(f"capacity={capacity}: config.{reason}")
        self.rope_length = self.capacity if rope_length is None else rope_length
        check_tokens("rope_length", self.rope_length, least=self.capacity)
        self.dtype = model.dtype
        self.layout: Layout | None = None  # that of a chunk which `prefill` gives the model
        self.on_device: dict[int | None, DeviceStep] | None = None  # by window, while step_graph runs a step of these
        self._stored: dict[int, LayerCache] = {}  # by layer
        self._left: dict[int, int | None] = {}  # the layer's window
        self._snapshots: WeakSet[Snapshot] = WeakSet()  # whose tokens it still holds
        self._kinds = [(_left(kind.window), kind.heads, count) for kind, count in layer_kinds(self.config).items()]
        self._comparison: Callable[[], None] | None = None  # of the last forward's token on all ranks; raises
        self._windows = {left for left, _, _ in self._kinds}
        self.plan = self._new_plan()
        super().__init__(layers=[_Layer(self) for _ in range(self.config.num_hidden_layers)])

    def _new_plan(self) -> CachePlan:
        return CachePlan(self.ring, self.capacity, self.chunk, tuple(self._windows))

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the ranks of this process, per batch row."""
        return self.bytes_for(self.capacity)

    def bytes_for(self, capacity: int) -> int:
        """`nbytes` of a cache of another capacity."""
        elements = sum(
            count * rows_for(capacity, self.chunk, self.ring.size, left) * heads.key_width
            for left, heads, count in self._kinds
        )
        return elements * self.dtype.itemsize * len(self.ring.local)

    # -- what transformers calls

    def __bool__(self) -> bool:
        """False: Phi 3 and phimoe drop a true cache when a document grows past their original length.

        The keys here already have the frequencies of `rope_length`. No other family tests the cache's truth.
        """
        return False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Record the layer for its attention, which runs next, and return new keys and values unchanged."""
        if layer_idx == 0 and self.on_device is None:
            if self.layout is None:  # a chunk of `prefill` has been compared
                self.compare_ranks(tokens_of_call(), wait=key_states.shape[-2] > 1)
            self._begin(key_states.shape[-2] if self.layout is None else self.layout.length)
        _pending.set((self, layer_idx))
        return key_states, value_states

    def compare_ranks(self, tokens: Tensor | None, wait: bool = True) -> None:
        """Raise ValueError unless all ranks were given these tokens and caches of one size. A collective.

        wait: False leaves the error to the next call, so that decoding on GPUs does not wait for each comparison.
        """
        if not isinstance(self.ring, ProcessRing) or self.ring.size == 1:
            return
        before, self._comparison = self._comparison, None
        if before is not None:
            before()
        total = checksum(self.ring.device, tokens, torch.tensor([self.plan.length, self.capacity, self.chunk]))
        check = comparison("input_ids, capacity and chunk", total, [self.ring], _ALL_COMPUTE)
        if wait:
            check()
        else:
            self._comparison = check

    def _begin(self, tokens: int) -> None:
        total = self.plan.length + tokens
        if total > self.capacity:
            raise ValueError(
                f"a RingCache of capacity={self.capacity} tokens holds {self.plan.length}, and cannot hold {tokens} "
                f"more: one of capacity={total} takes {_with_unit(self.bytes_for(total))} per batch row on each process"
            )
        self.plan.begin(tokens, self.layout)

    def device_steps(self) -> dict[int | None, DeviceStep]:
        """The device steps of each window that layers have, for `begin_on_device`."""
        return {left: DeviceStep.on(self.ring.device) for left in self._windows}

    def begin_on_device(self, steps: dict[int | None, DeviceStep]) -> None:
        """Begin a forward of one token, and write everything that layers need to know about it into `steps`."""
        self._begin(1)
        for left, step in steps.items():
            step.take(self.plan.steps(left)[0])
        for i, stored in self._stored.items():
            stored.move(0, self.plan.steps(self._left[i])[0].ranks[0])

    def attend(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, **options: Any) -> Tensor:
        """The layer's attention: q [B, n, Hq, D], k and v [B, n, Hkv, D] of new tokens to [B, n, Hq, Dv].

        options: scale, softcap and sink. Raises ValueError for another batch than the cache's, or another window than
        the configuration has, and RuntimeError if a gradient is asked for.
        """
        if torch.is_grad_enabled() and q.requires_grad:
            raise RuntimeError("a RingCache is for generating, without gradients: call the model under torch.no_grad()")
        left = _left(window)
        if left not in self._windows:
            known = [None if left is None else left + 1 for left in self._windows]
            raise ValueError(f"layer {layer_idx} has sliding_window={window}, and its configuration {known}")
        batch = len(q) // (1 if self.layout is None else len(self.ring.local))
        if layer_idx not in self._stored:
            self._stored[layer_idx] = LayerCache(len(self.ring.local), self.plan.rows(left), k, v, batch)
            self._left[layer_idx] = left
        stored = self._stored[layer_idx]
        if len(stored.k[0]) != batch or stored.k[0].dtype != q.dtype:
            raise ValueError(
                f"a RingCache of {len(stored.k[0])} batch rows of {stored.k[0].dtype} cannot take {batch} rows of "
                f"{q.dtype}: prefill it with the rows that generate computes (beams and returned sequences are rows)"
            )
        attention = Attention(self.ring, kernel=self.kernel, name=f"layer {layer_idx}", **options)
        if self.on_device is not None:
            return attention_on_device(q, k, v, stored, self.on_device[left], attention)
        return cached_attention(q, k, v, stored, self.plan.steps(left), attention)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the cache holds, over all ranks."""
        return self.plan.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The capacity."""
        return self.capacity

    def reset(self) -> None:
        """Forget all tokens, but keep the memory."""
        self.plan = self._new_plan()
        self._snapshots.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each batch row the cache of row beam_idx [B], as beam search does."""
        for stored in self._stored.values():
            for held in (*stored.k, *stored.v):
                held.copy_(held.index_select(0, beam_idx.to(held.device)))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Raises NotImplementedError: layers with windows no longer have the keys that would be visible again."""
        raise NotImplementedError(
            "a RingCache cannot be cropped, as assisted decoding does: take a snapshot() and restore() it"
        )

    # -- several prompts

    def snapshot(self) -> Snapshot:
        """The state to which `restore` returns. Of layers with windows, it copies the window."""
        windowed = {}
        for i, stored in self._stored.items():
            if (left := self._left[i]) is not None:
                used = self.plan.count(left)
                k, v = ([x[:, :n].clone() for x, n in zip(held, used, strict=True)] for held in (stored.k, stored.v))
                windowed[i] = (k, v)
        state = Snapshot(self.plan.snapshot(), windowed)
        self._snapshots.add(state)
        return state

    def restore(self, state: Snapshot) -> None:
        """Forget all tokens since the snapshot.

        Raises ValueError for a snapshot of another cache, or of tokens that this one has forgotten.
        """
        if state not in self._snapshots:
            raise ValueError(
                f"a snapshot of {state.plan.length} tokens is of another RingCache, or of tokens that this one forgot "
                f"by reset() or by restore() of an earlier snapshot: prefill them again"
            )
        self._snapshots = WeakSet(x for x in self._snapshots if x.plan.length <= state.plan.length)
        self.plan.restore(state.plan)
        for i, kept in state.windowed.items():
            for held, copies in zip((self._stored[i].k, self._stored[i].v), kept, strict=True):
                for x, copy in zip(held, copies, strict=True):
                    x[:, : copy.shape[1]] = copy


class _Layer(CacheLayerMixin):
    """The interface of a layer that transformers expects; the cache does all the work."""

    is_sliding = False  # for masks: ring attention has its own

    def __init__(self, cache: RingCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: memory is reserved in attention, which knows the layer's window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Never called: transformers requires it of every layer, but `RingCache.update` does the work."""
        raise NotImplementedError("a layer of a RingCache is updated by the cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens after this forward, and 0."""
        return self._cache.plan.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that the cache holds."""
        return self._cache.plan.length

    def get_max_length(self) -> int:
        """The cache's capacity."""
        return self._cache.capacity


@torch.no_grad()
def prefill(model: PreTrainedModel, input_ids: Tensor, cache: RingCache) -> None:
    """Read a document into a cache: all tokens after those that it already holds, shared by the ranks of its ring.

    input_ids: int64 [B, N], the same on every rank, beginning with the first token that the cache holds. Each forward
    reads up to `cache.chunk` tokens over all ranks, in zigzag, without computing logits. Every rank reads the last
    ones, fewer than two per rank: each call would otherwise add padding that the ranks do not share evenly. Then give
    `generate` at least one more token. Before computing anything, raises ValueError if the cache cannot hold the
    tokens, or if ranks were given different tokens.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        shown = (
            f"{[*input_ids.shape]}, {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise ValueError(f"input_ids must be int64 [B, N], got {shown}")
    tokens, ring = input_ids.shape[1], cache.ring
    if tokens > cache.capacity:
        raise ValueError(
            f"input_ids of {tokens} tokens do not fit a RingCache of capacity={cache.capacity}: one for them takes "
            f"{_with_unit(cache.bytes_for(tokens))} per batch row on each process"
        )
    cache.compare_ranks(input_ids)
    make, shares = (Layout.zigzag, 2 * ring.size) if ring.size > 1 else (Layout.contiguous, 1)
    while (begin := cache.get_seq_length()) < tokens:
        chunk = input_ids[:, begin : begin + cache.chunk // shares * shares]
        if even := chunk.shape[1] // shares * shares:
            _read(model, chunk[:, :even], cache, make(even, ring.size))
        else:
            _read(model, chunk, cache, None)


def _read(model: PreTrainedModel, chunk: Tensor, cache: RingCache, layout: Layout | None) -> None:
    """Read the next tokens into a cache, sharded by `layout`, or all on every rank."""
    ring, begin = cache.ring, cache.get_seq_length()
    if layout is None:
        ids, positions = chunk, torch.arange(chunk.shape[1])[None]
    else:
        ids = torch.cat([layout.shard(chunk, rank) for rank in ring.local])
        positions = torch.stack([layout.positions(rank) for rank in ring.local]).repeat_interleave(len(chunk), dim=0)
    cache.layout = layout
    try:
        model.base_model(
            input_ids=ids.to(ring.device),
            position_ids=(positions + begin).to(ring.device),
            past_key_values=cache,
            use_cache=True,
        )
    finally:
        cache.layout = None


def cache_refusal(config: PreTrainedConfig) -> str | None:
    """None, or why a model with this configuration cannot generate with a RingCache: "FIELD=VALUE is not ..."."""
    if shared := getattr(config, "num_kv_shared_layers", 0):
        return (
            f"num_kv_shared_layers={shared} is not supported by a RingCache: it keeps each layer's own keys, and the "
            f"last {shared} layers have none"
        )
    if calls_per_layer(config) > 1:
        return (
            f"model_type={config.model_type} is not supported by a RingCache: it keeps the keys of one call of "
            f"attention per layer"
        )
    if state_heads(config) is not None:
        return (
            f"model_type={config.model_type} is not supported by a RingCache: it keeps keys, and no states of linear "
            f"attention"
        )
    if has_chunks(config.model_type):
        return f"model_type={config.model_type} is not supported by a RingCache: it keeps windows, but no chunks"
    return refusal(config)


def _checked(model: Any) -> Any:
    """The configuration of a model that can generate on the ring. Raises ValueError with the reason if it cannot."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
    if (name := model.config._attn_implementation) != "ring":
        raise ValueError(
            f'a RingCache needs a model on the ring, got attn_implementation="{name}": load it with "ring"'
        )
    if (reason := cache_refusal(model.config)) is not None:
        raise ValueError(f"config.{reason}")
    if model.dtype not in OUT_DTYPES:
        raise ValueError(f"a RingCache takes a model of float16, bfloat16 or float32, got {model.dtype}")
    return model.config


def _left(window: int | None) -> int | None:
    """The number of tokens before its own that a query sees in a window of `window` tokens."""
    return None if window is None else window - 1


def _with_unit(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
