"""The contenders of decoding: flash_decode, and the libraries that people would use instead.

All are given the same q [B, 1, Hq, D] and the same keys and values [B, C, Hkv, D], and return [B, 1, Hq, D]. None
copies keys while it is timed. Everything that a peer prepares once per step, for all layers, is made before the clock
starts.

| name | what runs |
|---|---|
| ringflash | `flash_decode`, with the lengths on the device |
| SDPA flash | torch's SDPA, FLASH_ATTENTION, enable_gqa: FlashAttention 2, which splits the keys |
| SDPA cuDNN | torch's SDPA, CUDNN_ATTENTION, enable_gqa |
| SDPA efficient | torch's SDPA, EFFICIENT_ATTENTION, enable_gqa |
| SDPA math | torch's SDPA, MATH, enable_gqa: plain products, on the CPU alone |
| FlexAttention | torch.compile, static shapes, a block mask; its decoding kernel if Hq / Hkv is a power of 2 |
| FA4-CuTe | flash_attn.cute, from the package flash-attn-4; on sm_90 it does not split the keys |
| FlashInfer | BatchDecodeWithPagedKVCacheWrapper on tensor cores, pages of 16 tokens in order; never run yet |
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.checks import Attention
from benchmarks.contenders import Absent, Contender, by_head, first_of, flex, imported_peer, needs_gpu
from ringflash import flash_decode

PACKAGES = ("flash-attn-4", "flashinfer-python")
PAGE = 16  # tokens of a page of FlashInfer's cache


def contenders(device: torch.device) -> list[Contender]:
    """All of them, ours first."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if device.type == "cpu":
        backends["math"] = SDPBackend.MATH  # on a GPU it would repeat the keys for each query head
    else:
        backends |= {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    peers = {"FlexAttention": _flex, "FA4-CuTe": _fa4, "FlashInfer": _flashinfer}
    return [
        Contender("ringflash", _ringflash, ours=True),
        *(Contender(f"SDPA {name}", functools.partial(_sdpa, backend)) for name, backend in backends.items()),
        *(Contender(name, build if device.type == "cuda" else needs_gpu) for name, build in peers.items()),
    ]


def _ringflash(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    end = torch.full((1, 1), k.shape[1], dtype=torch.int32, device=q.device)
    return lambda q, k, v: flash_decode(q, k, v, end)


# -- torch

_CAN_USE = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.can_use_flash_attention,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.can_use_cudnn_attention,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.can_use_efficient_attention,
}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Attention:
    if q.is_cuda and (reason := _refusal(backend, q, k, v)):
        raise Absent(reason)

    def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(*by_head(q, k, v), enable_gqa=True).transpose(1, 2)

    return decode


def _refusal(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """torch's reason why SDPA refuses this backend."""
    asked = torch.backends.cuda.SDPAParams(*by_head(q, k, v), None, 0.0, False, True)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        able = _CAN_USE[backend](asked, debug=True)
    if able:
        return None
    reasons = [str(warning.message).partition(" (Triggered")[0].strip() for warning in given]
    return "torch: " + ("; ".join(reasons) or "this backend cannot be used, without a reason")


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    # Of blocks of 128 keys: without a mask all keys are one block, and one program may read them all.
    return flex(create_block_mask(lambda b, h, i, j: j >= 0, None, None, 1, k.shape[1], q.device.type))


# -- peers in separate packages


def _fa4(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    attention = imported_peer("flash_attn.cute.interface").flash_attn_func
    return lambda q, k, v: first_of(attention(q, k, v))


def _flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    module = imported_peer("flashinfer")
    batch, keys, kv_heads, dim = k.shape
    if keys % PAGE:
        raise Absent(f"{keys} keys are no whole pages of {PAGE}")
    count = keys // PAGE
    first = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * count
    pages = torch.arange(batch * count, dtype=torch.int32, device=q.device)
    used = torch.full((batch,), PAGE, dtype=torch.int32, device=q.device)
    workspace = torch.zeros(2**28, dtype=torch.uint8, device=q.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        first, pages, used, q.shape[2], kv_heads, dim, PAGE, q_data_type=q.dtype, kv_data_type=k.dtype
    )  # fmt: skip

    def decode(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        paged = tuple(x.view(batch * count, PAGE, kv_heads, dim) for x in (k, v))
        return wrapper.run(q[:, 0], paged)[:, None]

    return decode
