"""bf16 weights with their low bits are an exact fp32 master, and AdamW on them is AdamW."""

import pytest
import torch

from ringflash.training.optimizers.split_adamw import SplitAdamW, joined, split, stochastic_round

TIES = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000, 0x00008000, 0x7F7F7FFF, 0], dtype=torch.int32)


def test_splitting_loses_no_bit():
    numbers = torch.cat([torch.randn(100_000) * 10.0 ** torch.randint(-38, 30, (100_000,)), TIES.view(torch.float32)])
    weight, low = split(numbers)
    assert torch.equal(joined(weight, low).view(torch.int32), numbers.view(torch.int32))


def test_the_weight_is_the_master_rounded_to_nearest():
    numbers = torch.randn(100_000)
    assert torch.equal((split(numbers)[0] - numbers).abs(), (numbers.bfloat16() - numbers).abs())  # but for ties


def test_rounding_at_random_is_right_on_average():
    x, generator = torch.full((100_000,), 1.003), torch.Generator().manual_seed(0)
    found = stochastic_round(x, generator).float()
    assert set(found.tolist()) == {1.0, 1.0078125}
    assert abs(float(found.mean()) - 1.003) < 1e-4


def trained(optimizer_of, steps, beta2, dtype):
    """Weights of a least-squares fit after some steps, as an fp32 master."""
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(256, 32, generator=generator), torch.randn(32, 8, generator=generator) * 0.1
    weight = (torch.randn(32, 8, generator=generator) * 0.02).bfloat16().to(dtype).requires_grad_()
    start = weight.detach().float().clone()
    optimizer = optimizer_of([{"params": [weight], "weight_decay": 0.1}], lr=2e-5, betas=(0.9, beta2), eps=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        ((inputs @ weight.float() - inputs @ target) ** 2).mean().backward()
        optimizer.step()
    state = optimizer.state[weight]
    master = joined(weight.detach(), state["low"].view(torch.int16)) if "low" in state else weight.detach()
    return master - start


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_steps_below_the_weights_resolution_add_up_as_in_fp32(beta2):
    exact = trained(torch.optim.AdamW, 100, beta2, torch.float32)
    found = trained(lambda groups, **settings: SplitAdamW(groups, fused=False, **settings), 100, beta2, torch.bfloat16)
    assert (found - exact).norm() / exact.norm() < 0.02
    lost = trained(torch.optim.AdamW, 100, beta2, torch.bfloat16)
    assert (lost - exact).norm() / exact.norm() > 0.2  # a plain bf16 weight: what the low bits are for


def test_a_loaded_state_continues_bit_for_bit():
    def run(interrupted):
        torch.manual_seed(0)
        weight = torch.randn(64, dtype=torch.bfloat16).requires_grad_()
        optimizer = SplitAdamW([{"params": [weight]}], fused=False, lr=1e-3)
        for step in range(6):
            if interrupted and step == 3:
                saved = optimizer.state_dict()
                optimizer = SplitAdamW([{"params": [weight]}], fused=False, lr=1e-3)
                optimizer.load_state_dict(saved)
            weight.grad = torch.randn(64, generator=torch.Generator().manual_seed(step)).bfloat16()
            optimizer.step()
        return weight.detach(), optimizer.state[weight]["low"]

    for whole, resumed in zip(run(False), run(True), strict=True):
        assert torch.equal(whole.view(torch.int16), resumed.view(torch.int16))


def test_weights_of_another_dtype_are_refused():
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.zeros(3)
    with pytest.raises(TypeError, match=r"^SplitAdamW is for bf16 weights, got torch.float32$"):
        SplitAdamW([{"params": [weight]}], fused=False).step()
