"""A proof that a family is exact on the ring: loss and every gradient against eager attention, document by document."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from ringflash import IntervalMask, Loopback
from ringflash.models import AttentionConfig, attention, checkpoint_layers, ring_inputs
from ringflash.models.layers import layer_masks
from ringflash.ring.cost import Heads
from ringflash.training.engine import TrainedModel
from ringflash.training.memory import MemoryConfig
from tests.models.cases import DYNAMIC, GEMMA4_EXPERTS, LONGROPE, PHIMOE_ROPE, tiny

PLAIN, PACKED = (45,), (13, 1, 31)  # tokens of documents; one of a single token predicts nothing
LOSS, GRADIENT = 2e-6, 2e-5  # relative norms that fp32's rounding stays below
WINDOWS = {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
HARDER = {"qwen3": WINDOWS}  # than what other tests use
PHI4 = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20, "sliding_window": None}
# Models that their configuration says have 20 positions; after a longer document, 13 tokens reset transformers' module.
BEYOND = {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
ALPHA = {"rope_parameters": DYNAMIC | {"alpha": 3.0}, "max_position_embeddings": 20}
ALSO = {  # further models of a family whose models differ in kind
    "falcon_h1": [{"mamba_rms_norm": False}], "gemma4_text": [GEMMA4_EXPERTS],
    "granitemoehybrid": [{"position_embedding_type": "rope", "num_local_experts": 0}],
    "hunyuan_v1_dense": [ALPHA], "llama": [BEYOND], "phi3": [PHI4],
    "olmo_hybrid": [{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "linear_allow_neg_eigval": False}],
    "phimoe": [{"rope_parameters": PHIMOE_ROPE}],
}  # fmt: skip


@dataclass(frozen=True)
class Error:
    """The largest relative error of a loss, and of a parameter's gradient, with that parameter."""

    loss: float
    gradient: float
    name: str

    @property
    def passes(self):
        return self.loss <= LOSS and self.gradient <= GRADIENT  # False for NaN


class Prover:
    """A tiny model of a family, with weights at which attention matters, and what its eager attention gives."""

    @classmethod
    def all_of(cls, model_type):
        """Of each model that stands for the family."""
        return [cls(model_type, **fields) for fields in ({}, *ALSO.get(model_type, ()))]

    def __init__(self, model_type, **fields):
        self.model = tiny(model_type, **HARDER.get(model_type, {}) | fields).train()
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.model.parameters():
                p.add_(torch.randn(p.shape, generator=random) * (0.15 if p.dim() > 1 else 0.05))
        self.tokens = torch.randint(3, 97, (2, 45), generator=random)
        self.labels = self.tokens.clone()
        self.labels[0, 20:26] = self.labels[1, :9] = -100
        self.expected = {documents: self._eager(documents) for documents in (PLAIN, PACKED)}

    def _eager(self, documents):
        """Each document by itself: transformers packs nothing here."""
        self.model.set_attn_implementation("eager")
        self.model.zero_grad()
        total, count = 0.0, 0
        for row, labels in zip(self.tokens, self.labels, strict=True):
            for piece, target in zip(row.split(documents), labels.split(documents), strict=True):
                logits = self.model(input_ids=piece[None], use_cache=False).logits[0, :-1].float()
                total = total + cross_entropy(logits, target[1:], ignore_index=-100, reduction="sum")
                count += int((target[1:] != -100).sum())
        loss = total / count
        loss.backward()
        self.model.set_attn_implementation("ring")
        return loss.detach(), self._gradients()

    def _gradients(self):
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self._parameters()}

    def _parameters(self):
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def error(self, documents, ranks, recompute=False, trainer=False):
        """Of the model's own loss on a ring, or of the trainer's, whose head never makes all logits."""
        if recompute:
            checkpoint_layers(self.model)
        else:
            self.model.gradient_checkpointing_disable()
        self.model.zero_grad()
        inputs = ring_inputs(
            self.tokens, self.labels, ring=Loopback(ranks), documents=list(documents), config=self.model.config
        )
        if trainer:
            head = self.model.lm_head
            loss = TrainedModel(self.model, MemoryConfig(loss_tile=16), AttentionConfig())(**inputs)
            loss = loss / inputs["num_items_in_batch"]
            self.model.lm_head = head
        else:
            loss = self.model(**inputs).loss
        loss.backward()
        return self._compared(loss.detach(), documents)

    def _compared(self, loss, documents):
        expected, gradients = self.expected[documents]
        whole = sum(float(g.norm()) ** 2 for g in gradients.values()) ** 0.5
        errors = {
            name: float((found - gradients[name]).norm()) / max(float(gradients[name].norm()), 1e-3 * whole)
            for name, found in self._gradients().items()
        }
        worst = max(errors, key=errors.get)
        return Error(float((loss - expected).abs() / expected), errors[worst], worst)

    def attention(self, documents):
        """(visible pairs, Heads) of each call of ring_attention, counted."""
        calls, original = [], attention.ring_attention

        def spied(q, k, v, plan, **others):
            calls.append((plan.masks[0].area(), Heads(q.shape[2], k.shape[2], q.shape[3], v.shape[3])))
            return original(q, k, v, plan, **others)

        attention.ring_attention = spied
        try:
            config = self.model.config
            self.model(**ring_inputs(self.tokens, ring=Loopback(1), documents=list(documents), config=config))
        finally:
            attention.ring_attention = original
        return Counter(calls)

    def attention_of_configuration(self, documents):
        """The same as the configuration says, from which layouts and FLOPs are predicted."""
        length = sum(documents)
        mask = IntervalMask.causal(length) & IntervalMask.documents([list(documents)], length)
        counted = Counter()
        for seen, heads, count in layer_masks(self.model.config, mask):
            counted[seen.area(), heads] += count
        return counted
