"""A call whose result needs the whole sequence is refused by name; one whose result is each token's own is exact."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaModel,
    LlamaPreTrainedModel,
    Trainer,
)

from ringflash import Loopback
from ringflash.models import checks, ring_inputs
from ringflash.models.checks import check_call
from tests.models.cases import TINY, tiny

TOKENS = torch.randint(1, 97, (1, 32), generator=torch.Generator().manual_seed(0))


class Reward(LlamaPreTrainedModel):
    """The score of a sequence's last token, as reward models have it."""

    def __init__(self, config):
        super().__init__(config)
        self.backbone = LlamaModel(config)
        self.post_init()

    def forward(self, input_ids=None, **others):
        return self.backbone(input_ids=input_ids, **others).last_hidden_state[:, -1, 0]


class Derived(type(tiny("llama"))):
    """A user's own causal language model."""


def build(kind, model_type="llama", **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY, **fields)
    if not hasattr(kind, "from_config"):
        config._attn_implementation = "ring"
        return kind(config)
    return kind.from_config(config, attn_implementation="ring")


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        (AutoModelForSequenceClassification, False),
        (AutoModelForSequenceClassification, True),
        (AutoModelForQuestionAnswering, False),
        (Reward, False),
    ],
)
def test_a_head_that_reads_some_tokens_of_a_sequence_is_refused(kind, compiled):
    model = build(kind)
    if compiled:
        model.forward = torch.compile(model.forward, backend="eager")
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} is not supported on the ring: its head reads some"):
        model(**ring_inputs(TOKENS, ring=Loopback(2)))


@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "gemma2"])
def test_a_head_of_other_architectures_is_refused_too(model_type):
    with pytest.raises(ValueError, match="ForSequenceClassification is not supported on the ring"):
        build(AutoModelForSequenceClassification, model_type)(**ring_inputs(TOKENS, ring=Loopback(2)))


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForTokenClassification, AutoModelForCausalLM, Derived])
def test_each_tokens_own_output_is_exact(kind):
    model, inputs = build(kind).eval(), ring_inputs(TOKENS, ring=Loopback(4))
    found = model(**inputs)[0]
    model.set_attn_implementation("sdpa")
    expected = model(input_ids=TOKENS, use_cache=False)[0]
    whole = inputs["plan"].layout.unshard(found.chunk(4))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)


LABELLED = ring_inputs(TOKENS, TOKENS, ring=Loopback(2))
WRONG_CALLS = {
    "last logits": ({"logits_to_keep": 1}, r"logits_to_keep=1 is not supported on the ring"),
    "labels alone": ({"shift_labels": None}, "labels without shift_labels would be shifted within each shard"),
    "no count": ({"num_items_in_batch": None}, "num_items_in_batch is missing, so each rank would divide"),
    "a rank's count": ({"num_items_in_batch": 16}, "num_items_in_batch=16 is less than the 31 labels of the whole"),
    "a rank's count, in a tensor": (
        {"num_items_in_batch": torch.tensor(15)}, "=15 is less than the 31 .* average_tokens_across_devices=True"),
    "another batch": ({"input_ids": torch.ones(4, 16, dtype=torch.int64)}, r"input of \[4, 16\] .* for \[2, 16\]"),
    "another length": ({"input_ids": torch.ones(2, 9, dtype=torch.int64)}, r"input of \[2, 9\] .* for \[2, 16\]"),
    "positions of another batch": (
        {"position_ids": torch.arange(16).expand(3, -1), "attention_mask": None, "input_ids": torch.ones(3, 16).long()},
        r"position_ids \[3, 16\] do not fit the plan, of 2 local ranks"),
    "no plan": ({"plan": None}, "needs plan=, .* to generate, .*RingCache.*sdpa"),
    "another's plan": ({"plan": "causal"}, "needs plan=, an AttentionPlan, got 'causal'"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_an_argument_that_would_be_a_shards_own_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny("llama")(**LABELLED | change)


def test_counts_of_several_batches_and_logits_of_chosen_tokens_are_taken():
    model, inputs = tiny("llama"), ring_inputs(TOKENS, TOKENS, ring=Loopback(2))
    loss = model(**inputs | {"num_items_in_batch": torch.tensor(62)}).loss
    torch.testing.assert_close(loss, model(**inputs).loss / 2)
    own = ring_inputs(TOKENS, ring=Loopback(2)) | {"logits_to_keep": torch.tensor([3, 5])}
    torch.testing.assert_close(model(**own).logits, model(**inputs).logits[:, [3, 5]])


def test_labels_of_token_classification_are_refused_since_their_mean_is_a_shards():
    model = build(AutoModelForTokenClassification)
    with pytest.raises(ValueError, match="labels are not supported for LlamaForTokenClassification on the ring"):
        model(**LABELLED)


def shift_again(logits, labels, vocab_size, **others):
    """A loss as transformers' is without shift_labels."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_a_loss_that_may_shift_labels_again_is_refused():
    model = tiny("llama")
    model.loss_function = shift_again
    with pytest.raises(ValueError, match="loss_function=shift_again is not supported on the ring: labels are shifted"):
        model(**LABELLED)


class Loop(Trainer):
    """What a layer sees of a Trainer: its settings, and compute_loss, which calls the model."""

    def __init__(self, compute_loss_func=None, accelerator=None, **args):
        self.compute_loss_func, self.accelerator, self.model_wrapped = compute_loss_func, accelerator, tiny("llama")
        self.args = SimpleNamespace(**{"average_tokens_across_devices": True, "label_smoothing_factor": 0.0} | args)

    def compute_loss(self, call):
        return call()


class OneOfTwo(Loopback):
    """What a plan sees of a rank whose neighbours are in other processes."""

    def __init__(self):
        super().__init__(2)
        self.local = (0,)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"average_tokens_across_devices": False}, "^average_tokens_across_devices=False is not supported"),
        (
            {"neftune_noise_alpha": 5},
            "^neftune_noise_alpha=5 is not supported on the ring: the noise would be scaled by",
        ),
        ({"label_smoothing_factor": 0.1}, r"^label_smoothing_factor=0\.1 is not supported on the ring"),
        (
            {"accelerator": SimpleNamespace(distributed_type="MULTI_CPU")},
            "^the Trainer has not wrapped its model in DDP",
        ),
        ({"compute_loss_func": shift_again}, "^compute_loss_func=shift_again is not supported on the ring: labels are"),
    ],
)
def test_a_trainer_that_divides_by_a_ranks_labels_or_trains_it_alone_or_shifts_labels_again_is_refused(args, message):
    plan = ring_inputs(TOKENS, TOKENS, ring=OneOfTwo())["plan"]
    with pytest.raises(ValueError, match=message):
        Loop(**args).compute_loss(lambda: check_call(plan, None, None, None))
    Loop().compute_loss(lambda: check_call(plan, None, None, None))


class Wrapper(torch.nn.Module):
    """A user's model, with attributes named as a Trainer's settings."""

    def __init__(self, model):
        super().__init__()
        self.model, self.args = model, SimpleNamespace(label_smoothing_factor=0.1, average_tokens_across_devices=False)

    def compute_loss_func(self, loss):
        return loss

    def forward(self, inputs, labels=None):
        return self.compute_loss_func(self.model(**inputs).loss)

    def compute_loss(self, inputs, args=None):
        return self(inputs, labels=TOKENS)


def test_names_that_a_users_own_code_shares_with_a_trainer_are_no_settings():
    model = tiny("llama")
    assert Wrapper(model).compute_loss(LABELLED) == model(**LABELLED).loss


class OwnLoss(type(tiny("llama"))):
    """A causal language model with its own loss, for which it keeps the labels of ring_inputs."""

    def forward(self, input_ids=None, labels=None, shift_labels=None, num_items_in_batch=None, **others):
        logits = super().forward(input_ids=input_ids, **others).logits
        return torch.nn.functional.cross_entropy(logits.mT, shift_labels, reduction="sum") / num_items_in_batch


def test_a_forward_that_makes_its_own_loss_need_not_pass_labels_on():
    model, plain = build(OwnLoss), build(AutoModelForCausalLM)
    torch.testing.assert_close(model(**LABELLED), plain(**LABELLED).loss)
    with pytest.raises(ValueError, match="num_items_in_batch=16 is less than the 31 labels"):
        model(**LABELLED | {"num_items_in_batch": 16})


def test_labels_of_a_model_without_a_head_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"^labels went to a model that makes no loss of them: call it without labels$"
    ):
        build(AutoModel)(**LABELLED)


def test_one_process_counts_all_labels_by_itself():
    Loop(average_tokens_across_devices=False).compute_loss(lambda: tiny("llama")(**LABELLED))


def of_the_model():
    return build(AutoModelForCausalLM, is_causal=False)


def of_a_layer():
    model = tiny("llama")
    model.model.layers[1].self_attn.is_causal = False
    return model


@pytest.mark.parametrize("bidirectional", [of_the_model, of_a_layer])
def test_a_bidirectional_model_is_refused(bidirectional):
    with pytest.raises(ValueError, match="is_causal=False is not supported on the ring: ring_inputs makes causal"):
        bidirectional()(**LABELLED)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [("stablelm", "is not supported on the ring: transformers passes no"), ("opt", "is not one of the")],
)
def test_an_architecture_that_is_not_tested_is_refused_by_its_name(model_type, reason):
    fields = {name: value for name, value in TINY.items() if name != "head_dim"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), attn_implementation="ring")
    with pytest.raises(ValueError, match=rf"^config\.model_type={model_type} {reason}"):
        model(**LABELLED)


def test_generating_on_the_ring_names_the_cache_that_it_needs():
    with pytest.raises(ValueError, match=r"needs plan=.* to generate, give past_key_values=RingCache"):
        tiny("llama").generate(TOKENS, max_new_tokens=2)


def test_a_look_at_the_stack_reads_models_and_no_layers(monkeypatch):
    seen, look = [], checks._frames
    monkeypatch.setattr(checks, "_frames", lambda: seen.extend(look()) or seen)
    tiny("llama")(**LABELLED)
    assert [type(frame.owner).__name__ for frame in seen[:2]] == ["LlamaModel", "LlamaForCausalLM"]
    assert {name for frame in seen for name in frame.arguments} <= set(checks._ARGUMENTS)


class Outer(torch.nn.Module):
    """A user's forward, which frees a tensor after the model's call and reads its own locals."""

    def __init__(self, keeps):
        super().__init__()
        self.model, self.keeps = tiny("llama"), keeps

    def forward(self, inputs):
        large = torch.zeros(8)
        freed = weakref.ref(large)
        own = locals() if self.keeps else None
        self.model(**inputs)
        del large
        return freed() is None, own


def test_a_look_at_the_stack_keeps_no_tensor_of_an_outer_forward():
    """Until Python 3.12 a frame keeps a copy of its locals, once they are read, until it ends."""
    assert Outer(keeps=False)(LABELLED)[0]


def test_a_look_at_the_stack_leaves_an_outer_forwards_own_locals():
    assert {"self", "inputs", "large"} <= Outer(keeps=True)(LABELLED)[1].keys()


NO_LABELS = torch.full_like(TOKENS, -100)


@pytest.mark.parametrize("items", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_a_trainers_batch_without_any_label_is_refused_by_that_reason(items):
    inputs = ring_inputs(TOKENS, NO_LABELS, ring=Loopback(2))
    with pytest.raises(ValueError, match="num_items_in_batch=0 and every label of the batch is -100, so the"):
        tiny("llama")(**inputs | {"num_items_in_batch": items})
    assert tiny("llama")(**inputs).loss == 0
    assert tiny("llama")(**inputs | {"num_items_in_batch": 7}).loss == 0  # other batches of its step have labels


@pytest.mark.parametrize("model_type", ["falcon", "gpt_neo", "gptj"])
def test_a_model_that_picks_a_layers_class_by_its_attention_is_refused_by_its_name(model_type):
    message = rf"^config\.model_type={model_type} is not "
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type), attn_implementation="ring")


@pytest.mark.parametrize("model_type", ["rwkv", "xlstm", "cpmant"])
def test_a_model_that_reads_no_mask_is_refused_by_its_configuration(model_type):
    with pytest.raises(ValueError, match=rf"^config\.model_type={model_type} is not "):
        ring_inputs(TOKENS, ring=Loopback(2), config=AutoConfig.for_model(model_type))
