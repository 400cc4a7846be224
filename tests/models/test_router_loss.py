"""The experts' load-balancing loss of a ring is that of one rank, with its gradients."""

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from ringflash import IntervalMask, Layout, Loopback, ProcessRing
from ringflash.models import AttentionConfig, ring_inputs, router_loss
from ringflash.models.families import FAMILIES
from ringflash.ring.plan import AttentionPlan
from ringflash.ring.ulysses import Ulysses
from ringflash.training.engine import TrainedModel
from ringflash.training.memory import MemoryConfig
from tests.models.cases import loss_and_gradients, tiny

LENGTH, EXPERTS, ACTIVE = 21, 5, 2
# Families whose configuration has router_aux_loss_coef, but granitemoe's, of which transformers records no logits, and
# llama4_text, whose class does not add the experts' loss to its own.
BALANCED = [
    name
    for name in FAMILIES
    if hasattr(AutoConfig.for_model(name), "router_aux_loss_coef") and not name.startswith(("granite", "llama4"))
]


def defined(layers):
    """Equations 4 to 6 of the Switch Transformer over the tokens of all layers [..., experts], one by one."""
    p = torch.cat([x.flatten(0, -2) for x in layers]).softmax(-1)
    share = torch.zeros(p.shape[-1], dtype=p.dtype)
    for token in p.detach():
        for expert in token.topk(ACTIVE).indices:
            share[expert] += 1 / len(p)
    return p.shape[-1] * (share * p.mean(0)).sum()


def logits(rows=2, layers=3):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(rows, LENGTH, EXPERTS, generator=random, dtype=torch.float64) for _ in range(layers)]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_in_float64_the_loss_and_its_gradient_are_those_of_the_definition(ranks, layout):
    whole = [x.requires_grad_() for x in logits()]
    expected = defined(whole)
    gradients = torch.autograd.grad(expected, whole)
    mask = IntervalMask.causal(LENGTH)
    plan = AttentionPlan(mask, Layout.of(layout, mask, ranks), Loopback(ranks))
    share = router_loss([plan.shard(x, padding=7.0).flatten(0, 1) for x in whole], ACTIVE, plan)
    torch.testing.assert_close(share, expected, rtol=1e-12, atol=0)
    for found, reference in zip(torch.autograd.grad(share, whole), gradients, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-14)


def on_processes(ulysses):
    """A rank's share, the gradient by its own tokens, and their places in the sequence."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [dist.new_group([*range(i, i + ulysses)]) for i in range(0, size, ulysses)]
    columns = [dist.new_group([*range(i, size, ulysses)]) for i in range(ulysses)]
    ring = ProcessRing(columns[rank % ulysses])
    inputs = ring_inputs(
        torch.ones(2, LENGTH, dtype=torch.int64), ring=ring,
        ulysses=Ulysses(rows[rank // ulysses]) if ulysses > 1 else None,
    )  # fmt: skip
    plan = inputs["plan"]
    own = [plan.shard(x).flatten(0, 1).requires_grad_() for x in logits()]
    share = router_loss(own, ACTIVE, plan)
    return share.detach(), [x.reshape(2, -1, EXPERTS) for x in torch.autograd.grad(share, own)], plan.positions[0][0]


@pytest.mark.parametrize(("size", "ulysses"), [(3, 1), (4, 2)])
def test_processes_shares_add_up_to_the_loss_with_its_gradient(ranks, size, ulysses):
    whole = [x.requires_grad_() for x in logits()]
    expected = defined(whole)
    results = ranks.run(on_processes, size, ulysses)
    torch.testing.assert_close(sum(share for share, *_ in results), expected, rtol=1e-12, atol=0)
    for layer, reference in enumerate(torch.autograd.grad(expected, whole)):
        for _, gradients, positions in results:
            inside = positions < LENGTH
            torch.testing.assert_close(
                gradients[layer][:, inside], reference[:, positions[inside]], rtol=1e-10, atol=1e-14
            )
            assert not gradients[layer][:, ~inside].any()


@pytest.mark.parametrize("model_type", BALANCED)
def test_a_models_loss_with_that_of_its_experts_is_its_own_of_the_whole_sequences(model_type):
    model, tokens = tiny(model_type), torch.randint(3, 97, (2, 45))
    model.router_aux_loss_coef = 1.0
    asked = {"output_router_logits": True}
    inputs = ring_inputs(tokens, tokens, ring=Loopback(4), config=model.config)
    loss, gradients = loss_and_gradients(model, inputs | asked)
    plain = model(**inputs).loss
    model.set_attn_implementation("eager")
    expected, expected_gradients = loss_and_gradients(model, {"input_ids": tokens, "labels": tokens} | asked)
    assert loss > plain + 0.5  # of 2 out of 4 experts it is about 2
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=3e-6, msg=name)


def test_the_trainers_loss_has_the_gradient_of_the_experts_loss_and_the_value_of_the_tokens():
    model = tiny("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.7)
    tokens = torch.randint(3, 97, (2, 45))
    inputs = ring_inputs(tokens, tokens, ring=Loopback(3), documents=[20, 25])
    loss, expected = loss_and_gradients(model, inputs)
    count = inputs["num_items_in_batch"]
    trained = TrainedModel(model, MemoryConfig(recompute=True, loss_tile=16), AttentionConfig())
    model.zero_grad()
    found = trained(**inputs, router_weight=torch.tensor(float(count)))
    (found / count).backward()
    balance = loss - (found / count)
    assert 0.7 * 1.5 < balance < 0.7 * 3
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(trained(**inputs), found)  # as in evaluation, without experts' loss


def test_a_model_on_the_ring_without_the_mask_of_ring_inputs_is_refused_and_one_off_the_ring_is_not():
    model, tokens = tiny("mixtral"), torch.randint(3, 97, (1, 16))
    inputs = ring_inputs(tokens, tokens, ring=Loopback(2)) | {"output_router_logits": True}
    model(**inputs)
    with pytest.raises(ValueError, match="output_router_logits=True needs the attention_mask of ring_inputs"):
        model(**inputs | {"attention_mask": None})
    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    assert isinstance(plain, MixtralForCausalLM)
    assert plain(input_ids=tokens, labels=tokens, output_router_logits=True).aux_loss > 0
