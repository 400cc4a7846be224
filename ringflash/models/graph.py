"""step_graph: record a model's forward of one new token as a CUDA graph, and replay it for every later token.

    with step_graph(model, cache):
        model.generate(input_ids, past_key_values=cache, max_new_tokens=100)

A forward launches dozens of kernels per layer. For a single token, the host needs longer to launch most of them than
the GPU needs to run them. A graph is one launch. Everything that differs between tokens is in fixed tensors: the token,
its position and, for each window, where its key goes and what it sees (`ring.decode.DeviceStep`):

    host      plan: row, start, end   copy them, the token, its position   replay
    device                            the step before, still running       embedding, layers, logits

A graph cannot contain decisions of the host. Before recording, the step therefore runs once while torch raises an error
for everything that waits for the GPU (experts chosen on the host, RoPE whose length transformers looks up). The first
replay with another token than the recorded one is compared with the forward itself.

There is no graph on a CPU, for a model whose forward waits for the GPU, or on a ring of several ranks, since the
exchange of a layer cannot be part of a graph. By default a warning then says so, and forwards run as usual. So do
forwards of several tokens, of another cache, or with keywords that are not in `_TAKEN`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ringflash.models.cache import RingCache, pop_pending

CLOSE = 1e-2  # of logits' norm, between a replay and the forward: the same kernels, perhaps other sums of products
_WITHOUT = "generate without step_graph (graph=false of ringflash.generate)"
_TAKEN = {
    "input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "return_dict", "logits_to_keep",
}  # fmt: skip


def _warn(reason: str) -> None:
    warnings.warn(f"decoding without a CUDA graph, which {reason}", stacklevel=2)


@contextmanager
def step_graph(model: PreTrainedModel, cache: RingCache, *, refused: Callable[[str], object] = _warn) -> Iterator[None]:
    """A context in which forwards of one new token with this cache replay a CUDA graph, if that is possible.

    refused: called once with the reason if it is not ("needs ..."), on entry or in the first such forward; by default
    it warns. Raises RuntimeError if recording fails, or if a replay's logits differ from those of the forward.
    """
    if reason := _refusal(model, cache):
        refused(reason)
        yield
        return
    own = model.__dict__.get("forward")  # such as that of a hook
    steps = _Steps(model.forward, cache, refused)

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return steps(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def _refusal(model: PreTrainedModel, cache: RingCache) -> str | None:
    """None, or why no step can be recorded, as far as that is known before one runs: "needs ..."."""
    device = cache.ring.device
    if device.type != "cuda":
        return f"needs a GPU, got device {device}"
    if cache.ring.size > 1:
        return f"needs one rank, got {cache.ring.size}: the exchange of a layer is not part of a graph"
    if others := {str(x.device) for x in model.parameters()} - {str(device)}:
        return f"needs all weights on {device}, got some on {', '.join(sorted(others))}"
    return None


class _Steps:
    """The forwards of a model. The first one of a single new token records a graph, which later ones replay."""

    def __init__(self, eager: Callable[..., Any], cache: RingCache, refused: Callable[[str], object]) -> None:
        self.eager, self.cache, self.on_refusal = eager, cache, refused
        self.on_device = cache.device_steps()
        self.inputs: dict[str, Tensor] = {}  # input_ids and position_ids int64 [B, 1]
        self.out: Any = None  # the graph's, overwritten by each replay
        self.replay: Callable[[], object] | None = None
        self.replays = 0
        self.refused = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.refused or args or not self._is_step(kwargs):
            return self.eager(*args, **kwargs)
        self._begin(kwargs["input_ids"], kwargs.get("position_ids"))
        if self.replay is None:
            self._record()
        if self.replay is None:  # refused
            return self._run()
        self.replay()
        self.replays += 1
        logits = self.out.logits.clone()
        if self.replays == 2:
            self._check(logits)
        return type(self.out)(logits=logits, past_key_values=self.cache)

    def _is_step(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward is of one new token per batch row, and asks for nothing else."""
        ids, positions, mask = (kwargs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
        return (
            kwargs.get("past_key_values") is self.cache
            and self.cache.get_seq_length() > 0
            and self.cache.layout is None
            and isinstance(ids, Tensor)
            and ids.dim() == 2
            and ids.shape[1] == 1
            and ids.shape == self.inputs.get("input_ids", ids).shape
            and (positions is None or positions.shape in (ids.shape, (1, 1)))
            and not torch.is_grad_enabled()
            and kwargs.get("use_cache") is not False
            and kwargs.get("return_dict") is not False
            and all(name in _TAKEN or value is None or value is False for name, value in kwargs.items())
            and (mask is None or bool(mask.all()))  # the host waits here, as generate does after each token
        )

    def _begin(self, ids: Tensor, positions: Tensor | None) -> None:
        if not self.inputs:
            self.inputs = {
                name: torch.empty(ids.shape, dtype=torch.int64, device=self.cache.ring.device)
                for name in ("input_ids", "position_ids")
            }
        self.inputs["input_ids"].copy_(ids)
        if positions is None:
            self.inputs["position_ids"].fill_(self.cache.get_seq_length())
        else:
            self.inputs["position_ids"].copy_(positions)
        self.cache.begin_on_device(self.on_device)

    def _run(self) -> Any:
        """Run the step that has begun. It may run again, and then writes and returns the same values."""
        self.cache.on_device = self.on_device
        try:
            return self.eager(**self.inputs, past_key_values=self.cache, use_cache=True)
        finally:
            self.cache.on_device = None

    def _record(self) -> None:
        """Record the step that has begun, unless it waits for the GPU."""
        device = self.cache.ring.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self._run()  # compiles
            try:
                with _no_waiting():
                    self._run()
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                pop_pending()
                self.refused = True
                self.on_refusal(f"needs a model that never waits for the GPU, and this one does ({error})")
            else:
                self.replay = self._recorded(stream)
        torch.cuda.current_stream(device).wait_stream(stream)

    def _recorded(self, stream: torch.cuda.Stream) -> Callable[[], object]:
        """Record the step that has begun; the result replays it."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may keep using the GPU: those that watch a process group do.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.out = self._run()
        except RuntimeError as error:  # it may leave torch's generators unusable, so this is no refusal
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"a CUDA graph of this model's step cannot be recorded ({reason}): {_WITHOUT}"
            ) from error
        return graph.replay

    def _check(self, logits: Tensor) -> None:
        expected = self._run().logits.double()
        error = float((logits.double() - expected).norm() / expected.norm())
        if not error <= CLOSE:
            raise RuntimeError(
                f"a CUDA graph of this model's step gives other logits than its forward (relative error {error:.1e}): "
                f"{_WITHOUT}"
            )


@contextmanager
def _no_waiting() -> Iterator[None]:
    """A context in which torch raises RuntimeError if the host would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
