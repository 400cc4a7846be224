"""Answers: read a document once, and continue it with the answer to each prompt, over one rank or several."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, TextStreamer

from ringflash.distributed.world import World
from ringflash.errors import ConfigError, check_choice
from ringflash.generate.command import now, report
from ringflash.generate.loading import STDIN, ends_of, load_encoder, load_model, make_cache, text_of
from ringflash.generate.settings import ReadConfig
from ringflash.generate.turn import chat_turn
from ringflash.models import RingCache, prefill, step_graph
from ringflash.models.rope_length import growth_refusal

GRAPH = ("auto", "true", "false")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ReadConfig):
    """The document, the prompts, and how to answer them."""

    prompt: tuple[str, ...] = ()
    """Text that follows the document. May be given several times, each is answered in turn. -: every line of standard
    input is a prompt."""

    document: str | None = None
    """A text file in UTF-8, or - for standard input; by default there is only the prompt."""

    new_tokens: int = 256
    """Largest number of tokens in an answer, which may end earlier."""

    temperature: float = 0.0
    """Sampling temperature; 0: always the likeliest token (greedy)."""

    top_p: float = 1.0
    """With temperature, sample only from the likeliest tokens whose probabilities add up to this."""

    chat: bool = False
    """Wrap document, an empty line and prompt in a turn of the tokenizer's chat template."""

    system: str | None = None
    """With chat=true, the system message; by default what the template has without one."""

    prompt_tokens: int = 1024
    """With prompt=-, the longest prompt that the cache has room for."""

    graph: str = "auto"
    """Replay the forward of a new token as a CUDA graph. auto: on one GPU, if the model allows it; true: always, or an
    error says why not; false: never."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt:
            raise ConfigError('prompt is not set: prompt="..." is what follows the document, prompt=- standard input')
        if self.system is not None and not self.chat:
            raise ConfigError(f"system={self.system:.60} is a message of a conversation: set chat=true, too")
        if STDIN in self.prompt and (len(self.prompt) > 1 or self.document == STDIN):
            raise ConfigError("prompt=- reads standard input to its end: it is the only prompt, and document a file")
        self.at_least(new_tokens=1, prompt_tokens=1)
        check_choice("graph", self.graph, GRAPH)
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or more, and finite")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_p < 1 and not self.temperature:
            raise ConfigError(f"top_p={self.top_p} has no effect with temperature=0, which is greedy: set temperature")


def run(config: GenerateConfig, world: World) -> None:
    """Read the document and answer the prompts. Raises ConfigError, on every rank, for what cannot work."""
    file = config.document
    text = "" if file is None else world.from_rank_0(lambda: text_of("document", file))
    model = load_model(config, world.device)
    encoder, tokenizer = load_encoder(config, model)
    name = config.tokenizer or config.model
    before, after = chat_turn(tokenizer, name, config.system) if config.chat else (encoder.begin, [])
    document = [*before, *encoder.tokens(text)]
    between = "\n\n" if config.chat and text else ""

    def tokens_of(prompt: str) -> list[int]:
        return [*encoder.tokens(between + prompt), *after]

    prompts = [] if config.prompt == (STDIN,) else [*map(tokens_of, config.prompt)]
    lengths = [*map(len, prompts)] or [1, config.prompt_tokens]  # the lines of standard input are not known yet
    cache = _reserve(config, model, len(document), lengths, world)

    ids = torch.tensor([document], dtype=torch.int64, device=world.device)
    with _graph(config, model, cache, world):
        _read(model, ids, cache, world, has_text=bool(text))
        state = cache.snapshot()
        for prompt in prompts or map(tokens_of, _lines(world)):
            _check_prompt(len(prompt), max(lengths), cache)
            _answer(config, model, tokenizer, cache, torch.cat([ids, ids.new_tensor([prompt])], dim=1), world)
            cache.restore(state)


def _reserve(
    config: GenerateConfig, model: PreTrainedModel, document: int, prompts: list[int], world: World
) -> RingCache:
    """A cache for a document, its longest prompt and an answer. document, prompts: their numbers of tokens.

    Raises ConfigError if there is nothing to continue, or if an answer could change the document's rotary frequencies.
    """
    tokens = document + max(prompts) + config.new_tokens
    if document + min(prompts) == 0:
        raise ConfigError('prompt="" without a document leaves nothing to continue')
    if config.rope_length is None and (reason := growth_refusal(model.config, document + min(prompts), tokens)):
        raise ConfigError(f"{reason}: rope_length=N turns them all as in a document of N tokens")
    what = f"a document of {document} tokens, a prompt of {max(prompts)} and new_tokens={config.new_tokens}"
    return make_cache(config, model, tokens, world, what)


def _read(model: PreTrainedModel, ids: Tensor, cache: RingCache, world: World, has_text: bool) -> None:
    """Prefill a document's ids [1, N], and report how long that took and how large the cache is."""
    begin = now(world.device)
    prefill(model, ids[:, :-1], cache)  # generate reads the last token together with the prompt
    seconds, tokens = now(world.device) - begin, ids.shape[1]
    ranks = f" on each of {world.size} ranks" if world.size > 1 else ""
    read = f"document: {tokens} tokens read in {seconds:.2f} s ({tokens / seconds:.0f} tokens/s); " if has_text else ""
    report(world, f"{read}cache: {cache.nbytes / 2**20:.1f} MiB{ranks}, for {cache.capacity} tokens")


def _check_prompt(tokens: int, longest: int, cache: RingCache) -> None:
    """Raise ConfigError for a line of standard input that is longer than the longest prompt that was planned for."""
    if tokens > longest:
        raise ConfigError(
            f"a prompt of {tokens} tokens is longer than the {longest} that the cache has room for: set "
            f"prompt_tokens={tokens}, and the cache takes "
            f"{cache.bytes_for(cache.capacity + tokens - longest) / 2**20:.1f} MiB"
        )


def _graph(
    config: GenerateConfig, model: PreTrainedModel, cache: RingCache, world: World
) -> AbstractContextManager[None]:
    """While entered, new tokens are replays of a CUDA graph where config.graph has it, and where they can be.

    Raises ConfigError if graph=true and they cannot be: on entry, or at the first token of a model that waits.
    """

    def refused(reason: str) -> None:
        if config.graph == "true":
            raise ConfigError(f"graph=true {reason}; graph=auto decodes without one")
        report(world, f"decoding without a CUDA graph, which {reason}")

    if config.graph == "false" or (config.graph == "auto" and world.device.type != "cuda"):
        return nullcontext()
    return step_graph(model, cache, refused=refused)


def _answer(
    config: GenerateConfig, model: PreTrainedModel, tokenizer: Any, cache: RingCache, ids: Tensor, world: World
) -> None:
    """Print what the model continues `ids` [1, N] with, token by token, and then its speed."""
    torch.manual_seed(config.seed)
    sampled = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=config.new_tokens, do_sample=bool(sampled), **sampled,
        eos_token_id=ends_of(model, tokenizer), pad_token_id=0,
    )  # fmt: skip

    def of_rank_0(input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of rank 0, so that all ranks choose the same token, whatever their GPUs round."""
        if world.size > 1:
            scores = scores.contiguous()
            dist.broadcast(scores, src=0)
        return scores

    begin = now(world.device)
    out: Any = model.generate(  # type: ignore[operator]
        ids, generation_config=settings, past_key_values=cache, attention_mask=torch.ones_like(ids),
        streamer=_streamer(config, tokenizer) if world.is_first else None,
        logits_processor=LogitsProcessorList([of_rank_0]),
    )  # fmt: skip
    seconds, count = now(world.device) - begin, out.shape[1] - ids.shape[1]
    report(world, f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s)")


def _streamer(config: GenerateConfig, tokenizer: Any) -> TextStreamer:
    """What prints tokens as they come. It raises ConfigError for one that tokenizer=bytes does not have."""

    class Streamer(TextStreamer):
        def put(self, value: Tensor) -> None:
            try:
                super().put(value)
            except ValueError as error:
                raise ConfigError(
                    f"tokenizer={config.tokenizer or config.model} has {len(tokenizer)} tokens, and model="
                    f"{config.model} answers with token {int(value.max())}: name the model's own tokenizer"
                ) from error

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _lines(world: World) -> Iterator[str]:
    """Each line of standard input, which rank 0 reads."""
    while True:
        with world.without_timeout("waiting for a prompt on standard input"):
            line = sys.stdin.readline() if world.is_first else ""
        if not (line := world.broadcast(line)):
            return
        if line.strip():
            yield line.rstrip("\n")
