"""Tensors offloaded to host memory are restored bit for bit, in any order, and their blocks are reused.

Without a GPU the copies are plain ones.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from ringflash import offload
from ringflash.errors import ConfigError
from ringflash.offload import HostStore, PinnedPool


def offloaded(store, layers=5, device="cpu"):
    """A forward: three tensors per layer, of sizes that differ; (expected, offloaded) of each layer."""
    found = []
    for layer in range(layers):
        group = store.group(first=layer == 0)
        tensors = [torch.randn(3, 4 + layer, device=device), torch.randn(7, device=device).bfloat16()]
        tensors.append(torch.randn((), device=device))
        found.append([(x.clone(), group.offload(x)) for x in tensors])
        del tensors
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offloaded_tensors_come_back_bit_for_bit(device):
    store = HostStore()
    for _ in range(3):
        for layer in reversed(offloaded(store, device=device)):
            for expected, kept in layer:
                assert torch.equal(kept.get(), expected)


def test_blocks_are_used_again_by_the_next_step():
    store, sizes = HostStore(), []
    for _ in range(4):
        for layer in reversed(offloaded(store)):
            for _, kept in layer:
                kept.get()
        sizes.append(store.pool.bytes)
    assert sizes == [sizes[0]] * 4


def test_a_forward_without_a_backward_gives_its_blocks_back():
    store = HostStore()
    offloaded(store)
    needed = store.pool.bytes
    for layer in reversed(offloaded(store)):
        for expected, kept in layer:
            assert torch.equal(kept.get(), expected)
    assert store.pool.bytes == needed


def test_at_most_two_layers_are_still_on_the_device_in_the_forward():
    held = [[kept.x is not None for _, kept in layer] for layer in offloaded(HostStore(), layers=6)]
    assert held == [[False] * 3] * 4 + [[True] * 3] * 2


def test_a_layer_is_fetched_with_the_one_before_it_and_no_other():
    layers = offloaded(HostStore(), layers=6)
    layers[5][0][1].get()
    layers[4][0][1].get()  # these two had not left
    assert [[kept.x is not None for _, kept in layer] for layer in layers[:4]] == [[False] * 3] * 3 + [[True] * 3]


def test_a_tensor_changed_in_place_is_refused():
    store = HostStore()
    x = torch.zeros(3)
    kept = store.group(first=True).offload(x)
    x += 1
    store.group(first=False)
    assert kept.x is not None  # it has not left yet
    with pytest.raises(RuntimeError, match="was changed in place"):
        store.group(first=False)


def test_a_tensor_is_given_back_once():
    kept = HostStore().group(first=True).offload(torch.zeros(3))
    kept.get()
    with pytest.raises(RuntimeError, match="a second backward through a layer whose tensors were offloaded"):
        kept.get()


def test_reserved_blocks_are_made_before_they_are_taken_and_reported(monkeypatch):
    pool, lines = PinnedPool(pinned=False, remedy="less"), []
    monkeypatch.setattr(offload, "LOGGED", 128 / 2**30)
    pool.reserve([64, 64, 128], "this test", lines.append)
    pool.reserve([64], "another")
    assert pool.bytes == 256
    assert lines == ["host       0.0 GiB of memory to be pinned for this test", *["host       0 of 0 GiB pinned"] * 2]
    pool.allocate(64), pool.allocate(64), pool.allocate(128)
    assert pool.bytes == 256


def test_a_shorter_batch_needs_no_other_blocks():
    pool = PinnedPool(pinned=False, remedy="less")
    pool.reserve([64, 4096], "a test")
    short, long = pool.allocate(16), pool.allocate(1024)
    assert (short.numel(), long.numel()) == (64, 4096)
    pool.free(long)
    assert pool.allocate(4096) is long
    assert pool.bytes == 4160


def test_too_little_host_memory_is_refused_with_what_to_set():
    pool = HostStore().pool
    pool.reserve([2**20], "a test")
    message = (
        r"pins no more than 0\.0 GiB of host memory, and 2\.00 more were asked for: memory\.attention_results=host:N"
    )
    with mock.patch.object(torch, "empty", side_effect=RuntimeError("no")), pytest.raises(ConfigError, match=message):
        pool.reserve([2**31], "a test")


def test_a_pool_that_is_gone_unregisters_its_blocks():
    calls = []

    class Cuda:
        @staticmethod
        def cudaHostRegister(address, size, flags):  # noqa: N802
            calls.append(("register", address))
            return 0

        @staticmethod
        def cudaHostUnregister(address):  # noqa: N802
            calls.append(("unregister", address))

    with mock.patch.object(torch.cuda, "cudart", return_value=Cuda):
        pool = PinnedPool(pinned=True, remedy="less")
        pool.reserve([64, 4096], "a test")
        pool.free(pool.allocate(64))
        del pool
    registered = [address for what, address in calls if what == "register"]
    assert [address for what, address in calls if what == "unregister"] == registered
    assert len(registered) == 2
