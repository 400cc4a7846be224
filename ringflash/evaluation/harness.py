"""RingLM: a model on the ring for lm-eval, EleutherAI's harness, whose long tasks then run over several ranks.

Needs the package lm-eval. Such tasks are ruler, babilong and longbench.

    from lm_eval import simple_evaluate
    lm = RingLM(model, tokenizer, ring=ProcessRing(device=device), max_length=131072)   # or without ring: one device
    results = simple_evaluate(lm, tasks=["niah_single_1"], metadata={"max_seq_lengths": [131072]})

The model is the result of `ringflash.generate.loading.load_model` for the folder of a model or an adapter. Every rank
runs this program, with all requests in the same order, and gets the same results. The ranks share the reading of
contexts; each computes the continuations, and the texts of loglikelihood_rolling. Consecutive requests with the same
context read it once. Nothing is truncated: a request longer than max_length is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ringflash.generate.loading import ends_of
from ringflash.models import RingCache, prefill
from ringflash.models.rope import supported_positions
from ringflash.ring.cache_plan import CHUNK
from ringflash.ring.transport import Ring

AT_ONCE = 1024  # tokens whose logits are computed at once


class RingLM(TemplateLM):
    """Log-likelihoods and greedy answers of a model on the ring.

    max_length: the most tokens of a request; None: the model's positions. max_gen_toks: of answers whose task sets no
    number. Raises ValueError for a request that is longer, and for a task that samples.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        ring: Ring | None = None,
        chunk: int = CHUNK,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.ring, self.chunk = model.eval(), tokenizer, ring, chunk
        known = supported_positions(model.config)
        if max_length is None and known is None:
            raise ValueError("max_length must be set for a model without max_position_embeddings")
        self.max_length: int = known if max_length is None else max_length  # type: ignore[assignment]
        self.max_gen_toks = max_gen_toks
        self._cache: RingCache | None = None

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's fingerprints."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, by the tokenizer's template."""
        return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; with what the tokenizer adds, unless the text begins with it or it is not asked for."""
        bos = self.tokenizer.bos_token
        added = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=added)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each continuation of its context."""
        cache = self._room(max((len(x) + len(y) for _, x, y in requests), default=1))
        results, held, state = [], None, cache.snapshot()
        for _, context, continuation in requests:
            if context != held:
                cache.reset()
                prefill(self.model, self._ids(context[:-1]), cache)
                held, state = context, cache.snapshot()
            results.append(self._score(cache, context[-1], continuation))
            cache.restore(state)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, all of it at once, behind an end of text."""
        results = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            cache = self._room(len(tokens) + 1)
            results.append(self._score(cache, self.prefix_token_id, tokens)[0])
        return results

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, up to the first of the strings that each request stops at."""
        answers = []
        for context, settings in (request.args for request in requests):
            if settings.get("do_sample") or settings.get("temperature"):
                raise ValueError(f"RingLM decodes greedily, and a task asks for {settings}")
            until = [settings["until"]] if isinstance(settings.get("until"), str) else settings.get("until") or []
            until = [stop for stop in until if stop]  # an empty one stops nothing, as in lm-eval's own models
            most = settings.get("max_gen_toks") or settings.get("max_new_tokens") or self.max_gen_toks
            stops = {"stop_strings": until, "tokenizer": self.tokenizer} if until else {}
            tokens = self.tok_encode(context)
            cache, ids = self._room(len(tokens) + most), self._ids(tokens)
            prefill(self.model, ids[:, :-1], cache)
            out: Any = self.model.generate(  # type: ignore[operator]
                ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False,
                eos_token_id=ends_of(self.model, self.tokenizer), pad_token_id=self.eot_token_id, **stops,
            )  # fmt: skip
            answer: Any = self.tokenizer.decode(
                out[0, ids.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            answers.append(min((answer.split(stop)[0] for stop in until), key=len, default=answer))
        return answers

    @torch.no_grad()
    def _score(self, cache: RingCache, last: int, tokens: list[int]) -> tuple[float, bool]:
        """Log-likelihood of tokens behind what the cache holds and `last`, and whether each is the likeliest."""
        total, likeliest, fed = 0.0, True, [last, *tokens[:-1]]
        for first in range(0, len(tokens), AT_ONCE):
            ids, wanted = (self._ids(x[first : first + AT_ONCE]) for x in (fed, tokens))
            scores = self.model(ids, past_key_values=cache, use_cache=True).logits[0].float().log_softmax(-1)
            total += float(scores.gather(1, wanted.T).double().sum())
            likeliest = likeliest and bool((scores.argmax(-1) == wanted[0]).all())
        return total, likeliest

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], dtype=torch.int64, device=self.model.device)

    def _room(self, tokens: int) -> RingCache:
        """An empty cache for as many tokens: the last one where that is large enough."""
        if tokens > self.max_length:
            raise ValueError(f"a request of {tokens} tokens is longer than max_length={self.max_length}")
        if self._cache is None or self._cache.capacity < tokens:
            self._cache = RingCache(self.model, tokens, ring=self.ring, chunk=self.chunk)
        self._cache.reset()
        return self._cache
