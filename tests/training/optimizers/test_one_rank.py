"""On one rank the optimizer uses bf16 weights and gradients where they are, bit for bit as DeepSpeed's copies."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ringflash import Layout
from ringflash.training.engine import build_engine
from ringflash.training.memory import MemoryConfig
from ringflash.training.optimizers import host_adamw, one_rank
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.optimizers.one_rank import in_chunks
from ringflash.training.step import prepare, train_step
from tests.training.engines import LENGTH, SEQUENCES, build, joined, sequences


def started(zero, states):
    """An engine, and a step of it."""
    world = joined(None)
    optim = OptimConfig(steps=4, batch=SEQUENCES, micro_batch=SEQUENCES, warmup=0, lr=1e-2, clip=0.05)
    engine = build_engine(build("qwen3").bfloat16(), optim, MemoryConfig(zero=zero, optimizer_states=states), world)
    engine.module.reserve_host_memory(LENGTH)

    def step(divisor=1):
        data = prepare(engine, sequences("uneven"), world, lambda mask: Layout.zigzag(LENGTH, world.size))
        for inputs, *_ in data:
            inputs["shift_labels"][0, :: 8 * divisor] = -100
        return train_step(engine, data, world)

    return engine, step


def trained(zero, states, by_deepspeed):
    """Figures of three steps, the second of which is not finite, and the weights after them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_adamw, "CHUNK", 1000)  # most gradients begin in one chunk and end in another
        if by_deepspeed:
            patch.setattr(one_rank, "SETTINGS", {})
            patch.setattr(one_rank, "ZERO_SETTINGS", {})
            patch.setattr(one_rank, "update_in_place", one_rank.share_weights)
        engine, step = started(zero, states)
        results = [step()]
        hook = engine.module.model.lm_head.register_forward_hook(lambda module, inputs, loss: loss * float("nan"))
        results.append(step())
        hook.remove()
        results.append(step(2))
    figures = [(result.loss.item(), float(result.gradient_norm)) for result in results]
    return repr(figures), {name: p.detach().clone() for name, p in engine.module.named_parameters()}


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "states"), [(1, "bf16"), (2, "bf16"), (1, "host")])
def test_the_weights_are_those_that_deepspeeds_copies_give(ranks, zero, states):
    ((expected, weights),) = ranks.run(trained, 1, zero, states, True)
    ((found, theirs),) = ranks.run(trained, 1, zero, states, False)
    assert found == expected
    assert "nan" in found
    assert [name for name, w in weights.items() if not torch.equal(w, theirs[name])] == []


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that operations make, beside what there is already."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = {x.untyped_storage().data_ptr() for x in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return found


def largest(by_deepspeed):
    """The bytes of the largest memory that a step makes after its backward, and those of all bf16 gradients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_adamw, "CHUNK", 1000)
        if by_deepspeed:
            patch.setattr(one_rank, "update_in_place", one_rank.share_weights)
        engine, step = started(1, "host")
        made = Largest([*engine.module.parameters(), *engine.optimizer.single_partition_of_fp32_groups])

        def watched(call):
            def inside(*args, **kwargs):
                with made:
                    return call(*args, **kwargs)

            return inside

        for name in ("_backward_epilogue", "step"):
            patch.setattr(engine, name, watched(getattr(engine, name)))
        step()
    return made.bytes, 2 * sum(p.numel() for p in engine.module.parameters())


@pytest.mark.ranks
def test_a_step_makes_no_copy_of_all_gradients(ranks):
    ((made, gradients),) = ranks.run(largest, 1, False)
    ((copied, _),) = ranks.run(largest, 1, True)
    assert made < 0.7 * gradients < copied


@pytest.mark.parametrize("sizes", [[7], [3, 0, 9, 1], [4, 4], [1, 2, 20, 0]], ids=str)
def test_chunks_hold_every_element_once_in_order(sizes):
    parts = list(torch.arange(sum(sizes)).split(sizes))
    chunks = list(in_chunks(given := parts, 4))
    assert torch.cat(chunks).tolist() == list(range(sum(sizes)))
    assert [len(chunk) for chunk in chunks[:-1]] == [4] * (len(chunks) - 1)
    assert given == []
