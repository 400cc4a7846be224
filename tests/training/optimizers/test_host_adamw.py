"""AdamW with its states in host memory trains bit for bit as with fp32 states, and keeps no second copy of weights."""

import pytest
import torch

from ringflash import Layout
from ringflash.training.engine import build_engine
from ringflash.training.memory import MemoryConfig
from ringflash.training.optimizers import host_adamw
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.optimizers.host_adamw import HostAdamW
from ringflash.training.step import prepare, train_step
from tests.training.engines import LENGTH, SEQUENCES, build, joined, sequences
from tests.training.fits import weights_of


def trained(zero, states, clip, chunk=2**24):
    """Losses, norms and weights of three steps with bf16 weights, and the log of what was reserved."""
    host_adamw.CHUNK, before = chunk, host_adamw.CHUNK
    world, lines = joined(None), []
    optim = OptimConfig(steps=3, batch=SEQUENCES, micro_batch=SEQUENCES, warmup=0, lr=1e-2, clip=clip, eps=1e-4)
    engine = build_engine(build("llama").bfloat16(), optim, MemoryConfig(zero=zero, optimizer_states=states), world)
    engine.module.reserve_host_memory(LENGTH, lines.append)
    data = prepare(engine, sequences("uneven"), world, lambda mask: Layout.zigzag(LENGTH, world.size))
    results = [train_step(engine, data, world) for _ in range(3)]
    host_adamw.CHUNK = before
    figures = [(result.loss.item(), float(result.gradient_norm)) for result in results]
    return figures, weights_of(engine), lines


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "clip"), [(1, 0.0), (2, 0.05), (3, 0.05)])
def test_states_on_the_host_train_bit_for_bit_as_fp32_states(ranks, zero, clip):
    ((expected, weights, nothing),) = ranks.run(trained, 1, zero, "fp32", clip)
    ((found, theirs, lines),) = ranks.run(trained, 1, zero, "host", clip, 1000)
    assert [loss for loss, _ in found] == [loss for loss, _ in expected]
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-6)
    assert [name for name, w in weights.items() if not torch.equal(w, theirs[name])] == []
    assert (len(nothing), len(lines)) == (0, 1)
    assert "GiB of memory to be pinned for optimizer states" in lines[0]


def updated_in_place(states):
    """Whether DeepSpeed's flat masters, on one rank, are the model's own memory."""
    world = joined(None)
    optim = OptimConfig(batch=SEQUENCES, micro_batch=SEQUENCES, clip=1.0)
    engine = build_engine(build("llama").bfloat16(), optim, MemoryConfig(zero=2, optimizer_states=states), world)
    masters = engine.optimizer.single_partition_of_fp32_groups
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    return [master.untyped_storage().data_ptr() in weights for master in masters]


@pytest.mark.ranks
def test_one_rank_has_no_second_copy_of_its_bf16_weights(ranks):
    assert [ranks.run(updated_in_place, 1, states)[0] for states in ("bf16", "host", "fp32")] == [
        [True, True], [True, True], [False, False],
    ]  # fmt: skip


def test_a_file_of_another_size_is_refused(tmp_path):
    weight = torch.zeros(5, dtype=torch.bfloat16, requires_grad=True)
    optimizer = HostAdamW([{"params": [weight]}], fused=False, clip=0.0)
    optimizer.reserve([weight])
    optimizer.save(tmp_path, 3)
    file = tmp_path / "host_states_rank_3.bin"
    assert file.stat().st_size == 5 * 12
    file.write_bytes(b"1")
    with pytest.raises(ValueError, match=r"rank_3.bin has 1 bytes of optimizer states instead of 60$"):
        optimizer.load(tmp_path, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1000, 10_500])
def test_chunks_that_pass_through_a_gpu_are_updated_as_torch_does(monkeypatch, size):
    monkeypatch.setattr(host_adamw, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(size, generator=generator).bfloat16().cuda()
    weight, master = start.clone().requires_grad_(), start.float().requires_grad_()
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    mine = HostAdamW([{"params": [weight]}], fused=True, clip=0.0, **settings)
    theirs = torch.optim.AdamW([master], fused=True, **settings)
    mine.reserve([weight])
    for _ in range(4):
        weight.grad = torch.randn(size, generator=generator).bfloat16().cuda()
        master.grad = weight.grad.float()
        mine.step(), theirs.step()
        assert torch.equal(weight, master.bfloat16())
    torch.cuda.synchronize()
    assert torch.equal(torch.cat([chunk[0] for chunk in mine.state[weight]["chunks"]]), master.cpu())
