"""The tiled loss equals torch's cross entropy of whole logits, with its gradients, for any tile."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ringflash.training.loss import LossHead, LossOptions, _capped, tiled_cross_entropy


def whole(hidden, weight, labels, softcap, bias=0.0, scale=1.0, weights=1.0):
    """The same in float64 with all logits at once."""
    logits = scale * (hidden @ weight.T + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (weights * nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)).sum()


@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "softcap"])
def test_any_tile_gives_the_loss_and_gradients_of_whole_logits(tile, softcap):
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    labels = torch.randint(0, 97, (50,))
    labels[::5] = -100
    loss = tiled_cross_entropy(hidden, weight, labels, LossOptions(tile, softcap))
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = whole(exact_hidden, exact_weight, labels, softcap)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss * 0.25, (hidden, weight))
    expected = torch.autograd.grad(exact * 0.25, (exact_hidden, exact_weight))
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient - reference).norm() / reference.norm() < 1e-6


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["uncapped", "softcap"])
def test_a_heads_bias_and_scale_and_weights_of_tokens_are_those_of_whole_logits(softcap):
    head, hidden = nn.Linear(16, 97), torch.randn(50, 16, requires_grad=True)
    labels, weights = torch.randint(0, 97, (50,)), torch.randn(50)
    labels[::5] = -100
    loss = LossHead(head, LossOptions(7, softcap, scale=0.3))(hidden, labels, weights=weights)
    exact = [x.detach().double().requires_grad_() for x in (head.weight, head.bias, hidden)]
    expected = whole(exact[2], exact[0], labels, softcap, exact[1], 0.3, weights)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for gradient, reference in zip(
        torch.autograd.grad(loss, (head.weight, head.bias, hidden)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert (gradient - reference).norm() / reference.norm() < 1e-6


def test_labels_that_predict_nothing_give_loss_and_gradient_zero():
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = tiled_cross_entropy(hidden, weight, torch.full((8,), -100), LossOptions(3))
    loss.backward()
    assert loss == 0
    assert hidden.grad.abs().max() == 0
    assert weight.grad.abs().max() == 0


def test_logits_of_more_than_a_tile_never_exist(monkeypatch):
    rows = []
    logsumexp = torch.Tensor.logsumexp
    monkeypatch.setattr(torch.Tensor, "logsumexp", lambda x, dim: (rows.append(len(x)), logsumexp(x, dim))[1])
    tiled_cross_entropy(torch.randn(50, 4), torch.randn(9, 4), torch.zeros(50, dtype=torch.int64), LossOptions(16))
    assert rows == [16, 16, 16, 2]


@pytest.mark.parametrize("trained", [("hidden",), ("weight",)], ids=str)
def test_a_frozen_factor_takes_no_product_and_changes_no_other_gradient(trained):
    torch.manual_seed(2)
    whole_set = {"hidden": torch.randn(50, 16), "weight": torch.randn(97, 16)}
    labels, found, products = torch.randint(0, 97, (50,)), {}, []
    for wanted in (("hidden", "weight"), trained):
        factors = {name: x.clone().requires_grad_(name in wanted) for name, x in whole_set.items()}
        with FlopCounterMode(display=False) as counted:
            tiled_cross_entropy(**factors, labels=labels, options=LossOptions(16)).backward()
        products.append(counted.get_total_flops() / (2 * 50 * 16 * 97))
        found[wanted] = {name: x.grad for name, x in factors.items()}
    assert products == [3, 2]
    assert [name for name, x in found[trained].items() if x is not None] == [*trained]
    assert torch.equal(found[trained][trained[0]], found["hidden", "weight"][trained[0]])


def test_the_weights_gradient_is_summed_over_tiles_in_fp32():
    torch.manual_seed(1)
    hidden, weight = torch.randn(4096, 8), torch.randn(33, 8) * 0.1
    labels = torch.randint(0, 33, (4096,))
    errors = []
    for tile in (16, 4096):
        w = weight.bfloat16().requires_grad_()
        tiled_cross_entropy(hidden.bfloat16(), w, labels, LossOptions(tile)).backward()
        exact = weight.bfloat16().double().requires_grad_()
        whole(hidden.bfloat16().double(), exact, labels, None).backward()
        errors.append(((w.grad.double() - exact.grad).norm() / exact.grad.norm()).item())
    assert errors[0] < 2 * errors[1], f"256 tiles {errors[0]:.1e}, one tile {errors[1]:.1e}"


def test_a_loss_head_without_labels_gives_logits_and_shares_its_weight():
    plain = nn.Linear(8, 5, bias=False)
    head = LossHead(plain, LossOptions(4))
    assert head.weight is plain.weight
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(head(x), plain(x))


def test_the_softcaps_derivative_does_not_cancel_near_the_cap():
    logits = torch.tensor([-240.0, 1.0, 240.0])
    _, slope = _capped(logits, 30.0)
    exact = (logits.double() / 30).cosh() ** -2
    assert ((slope - exact).abs() <= 1e-5 * exact).all()
