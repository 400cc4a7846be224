"""Read a long document with a language model, and answer prompts on it.

    python -m ringflash.generate model=FOLDER document=book.txt prompt="Who is the murderer?"
    torchrun --nproc-per-node 4 -m ringflash.generate model=FOLDER document=book.txt prompt="..."   # over 4 GPUs
    python -m ringflash.generate model=FOLDER document=book.txt prompt="First?" prompt="Second?"    # read once
    cat book.txt | python -m ringflash.generate model=FOLDER document=- prompt="Who?"
    python -m ringflash.generate model=FOLDER document=book.txt prompt=-                            # a prompt per line

The model continues the document's tokens followed by the prompt's, with nothing between them. Tokens are printed as
they come, on standard output; times and memory on standard error. Over several ranks, the document is read in shares,
and its KV cache stays where it was read (`ringflash.models.RingCache`).

Settings are key=value:
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ringflash.errors import ConfigError, reason
from ringflash.training import failure

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from ringflash.data.tokenizer import Encoder
    from ringflash.training.world import World

STDIN = "-"


@dataclass(frozen=True)
class GenerateConfig:
    """What is read, and how it is continued."""

    model: str
    """Folder of a Hugging Face model."""

    prompt: tuple[str, ...]
    """What follows the document; several are answered one after another. -: each line of standard input."""

    document: str | None = None
    """A text file in UTF-8; -: standard input; none: the prompt stands alone."""

    tokenizer: str | None = None
    """Folder of a tokenizer, or bytes; none: the model's folder."""

    new_tokens: int = 256
    """The most tokens of an answer; an end of text ends it earlier."""

    temperature: float = 0.0
    """0: the likeliest token (greedy). Above: sampled, more at random the higher it is."""

    top_p: float = 1.0
    """Sampled from the likeliest tokens that have this probability together."""

    seed: int = 0
    """Of the random numbers, for each answer."""

    dtype: str = "auto"
    """Weights and cache: bf16, fp32, or auto: bf16 on a GPU, fp32 without one."""

    kernel: str = "auto"
    """Attention kernel of the document: auto, hopper, portable or blocked."""

    chunk: int = 8192
    """Tokens per rank that a forward reads at once."""

    prompt_tokens: int = 1024
    """With prompt=-: the longest prompt that the cache has room for."""

    extrapolate_positions: bool = False
    """Go beyond the model's positions (max_position_embeddings, or what its RoPE scales to)."""

    untested_family: bool = False
    """Load a model_type that docs/models.md does not list, as model.untested_family of the trainer."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError('prompt is not set: prompt="..." is what follows the document, prompt=- standard input')
        if STDIN in self.prompt and (len(self.prompt) > 1 or self.document == STDIN):
            raise ConfigError("prompt=- reads standard input to its end: it is the only prompt, and document a file")
        for name, least in (("new_tokens", 1), ("chunk", 2), ("prompt_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be {least} or more")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or more, and finite")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")

    @classmethod
    def parse(cls, arguments: list[str]) -> GenerateConfig:
        """Settings of key=value. Raises ConfigError naming one that cannot be."""
        fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {"prompt": ()}
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if not equals or name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                raise ConfigError(
                    f"{argument[:100]} is not a setting of ringflash.generate"
                    + (f"; did you mean {close[0]}=...?" if close else f": these are {', '.join(fields)}, see --help")
                )
            if name == "prompt":
                given["prompt"] += (value,)
            elif name in given:
                raise ConfigError(f"{name} is set more than once: {name}={given[name]} and {name}={value}")
            else:
                given[name] = _typed(name, value, fields[name])
        if "model" not in given:
            raise ConfigError("model is not set: model=FOLDER is a Hugging Face model")
        return cls(**given)


def _typed(name: str, value: str, kind: str) -> Any:
    """A setting's value of its type. Raises ConfigError naming what it must be."""
    try:
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()]
        return {"int": int, "float": float}.get(kind, str)(value)
    except (ValueError, KeyError):
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise ConfigError(f"{name}={value} must be {wanted}") from None


def main(arguments: list[str]) -> None:
    """Parse the settings, read the document, answer the prompts."""
    if {"--help", "-h"} & {*arguments}:
        print(f"{__doc__}\n{_settings_help()}")
        return
    config = GenerateConfig.parse([x for x in arguments if not x.startswith("--local_rank=")])
    import torch.distributed as dist

    from ringflash.training.parallel import ParallelConfig
    from ringflash.training.world import join

    world = join(ParallelConfig(layout="zigzag"))
    try:
        run(config, world)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(config: GenerateConfig, world: World) -> None:
    """Everything after the ranks are connected. Raises ConfigError, on every rank, for what cannot work."""
    import torch

    from ringflash.models import RingCache, prefill

    text = world.broadcast(_document(config) if world.is_first else None)
    if isinstance(text, ConfigError):
        raise text
    model = _model(config, world.device)
    encoder, tokenizer = _tokenizer(config, model)
    document = [*encoder.begin, *_ids(encoder, text)] if text is not None else [*encoder.begin]
    prompts = [] if config.prompt == (STDIN,) else [_ids(encoder, prompt) for prompt in config.prompt]
    longest = max(map(len, prompts)) if prompts else config.prompt_tokens
    cache = RingCache(
        model, max(1, len(document) + longest + config.new_tokens), ring=world.ring, chunk=config.chunk,
        kernel=config.kernel,
    )  # fmt: skip
    _check_room(config, cache, len(document), longest, world)

    ids = torch.tensor([document], dtype=torch.int64, device=world.device)
    begin = _now(world.device)
    prefill(model, ids[:, :-1], cache)  # generate reads the last one with the prompt
    seconds = _now(world.device) - begin
    ranks = f" on each of {world.size} ranks" if world.size > 1 else ""
    _report(
        world,
        f"document: {len(document)} tokens read in {seconds:.2f} s ({len(document) / seconds:.0f} tokens/s); "
        f"cache: {cache.nbytes / 2**20:.1f} MiB{ranks}, for {cache.capacity} tokens",
    )
    state = cache.snapshot()
    for prompt in _prompts(config, encoder, prompts, world):
        if len(prompt) > longest:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens is longer than the {longest} that the cache has room for: set "
                f"prompt_tokens={len(prompt)}, and the cache takes "
                f"{cache.bytes_for(cache.capacity + len(prompt) - longest) / 2**20:.1f} MiB"
            )
        if not document and not prompt:
            raise ConfigError('prompt="" without a document leaves nothing to continue')
        _answer(config, model, tokenizer, cache, torch.cat([ids, ids.new_tensor([prompt])], dim=1), world)
        cache.restore(state)


def _answer(
    config: GenerateConfig, model: PreTrainedModel, tokenizer: Any, cache: Any, ids: Tensor, world: World
) -> None:
    """Print what the model continues `ids` [1, N] with, token by token, and then its speed."""
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, TextStreamer

    torch.manual_seed(config.seed)
    sampled = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    ends = model.generation_config.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=config.new_tokens, do_sample=bool(sampled), **sampled,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends, pad_token_id=0,
    )  # fmt: skip
    begin = _now(world.device)
    out: Any = model.generate(  # type: ignore[operator]
        ids, generation_config=settings, past_key_values=cache, attention_mask=torch.ones_like(ids),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if world.is_first else None,
        logits_processor=LogitsProcessorList([_OfFirstRank(world)]),
    )  # fmt: skip
    seconds, count = _now(world.device) - begin, out.shape[1] - ids.shape[1]
    _report(world, f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s)")


class _OfFirstRank:
    """Every rank takes rank 0's logits, so that all choose the same token, whatever their GPUs round."""

    def __init__(self, world: World) -> None:
        self.size = world.size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, vocabulary] of rank 0."""
        if self.size > 1:
            import torch.distributed as dist

            scores = scores.contiguous()
            dist.broadcast(scores, src=0)
        return scores


# -- what is given


def _model(config: GenerateConfig, device: torch.device) -> PreTrainedModel:
    from transformers.utils.logging import disable_progress_bar

    from ringflash.models import AttentionConfig, ModelConfig, build_model, check_kernel

    disable_progress_bar()
    settings = ModelConfig(path=config.model, dtype=config.dtype, untested_family=config.untested_family)
    try:
        attention = AttentionConfig(kernel=config.kernel)
        model = build_model(settings).eval().to(device)  # type: ignore[arg-type]
        check_kernel(settings, attention, model.config, device)
    except ConfigError as error:
        told = str(error).replace("model.path=", "model=").replace("attention.kernel=", "kernel=")
        raise ConfigError(told.replace("model.dtype=", "dtype=").replace("model.untested", "untested")) from error
    return model


def _tokenizer(config: GenerateConfig, model: PreTrainedModel) -> tuple[Encoder, Any]:
    """What encodes texts, and the tokenizer, which decodes. Raises ConfigError for one that does not fit the model."""
    from ringflash.data.tokenizer import encoder, load_tokenizer, tokenizer_size

    name = config.tokenizer or config.model
    try:
        tokenizer = load_tokenizer(SimpleNamespace(tokenizer=name))  # type: ignore[arg-type]
        found = encoder(tokenizer, name)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.tokenizer=", "tokenizer=")) from error
    if (size := tokenizer_size(tokenizer)) > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer={name} does not fit model={config.model}: it has {size} tokens, and the model "
            f"vocab_size={model.config.vocab_size}"
        )
    return found, tokenizer


def _document(config: GenerateConfig) -> str | ConfigError | None:
    """The document's text, or what is wrong with it: rank 0 reads, and all ranks raise."""
    if config.document is None:
        return None
    where = "standard input" if config.document == STDIN else f"document={config.document}"
    try:
        held = sys.stdin.buffer.read() if config.document == STDIN else Path(config.document).read_bytes()
        text = held.decode()
    except UnicodeDecodeError as error:
        return ConfigError(f"{where} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#04x}")
    except OSError as error:
        return ConfigError(f"{where} cannot be read: {error.strerror or reason(error)}")
    return text if text.strip() else ConfigError(f"{where} is empty")


def _prompts(config: GenerateConfig, encoder: Encoder, prompts: list[list[int]], world: World) -> Iterator[list[int]]:
    """Tokens of each prompt; of prompt=-, of each line that rank 0 reads."""
    yield from prompts
    while config.prompt == (STDIN,):
        with world.without_timeout("waiting for a prompt on standard input"):
            line = sys.stdin.readline() if world.is_first else ""
        if not (line := world.broadcast(line)):
            return
        if line.strip():
            yield _ids(encoder, line.rstrip("\n"))


def _ids(encoder: Encoder, text: str) -> list[int]:
    return encoder.ids([text])[0].tolist()


def _check_room(config: GenerateConfig, cache: Any, document: int, prompt: int, world: World) -> None:
    """Raise ConfigError, on every rank, where positions or the memory of any rank do not suffice."""
    import torch

    from ringflash.models.rope import supported_positions

    what = f"a document of {document} tokens, a prompt of {prompt} and new_tokens={config.new_tokens}"
    known = supported_positions(cache.config)
    if known is not None and cache.capacity > known and not config.extrapolate_positions:
        raise ConfigError(
            f"{what} are {cache.capacity} positions, more than the {known} that the model supports: shorten them, or "
            f"allow it by extrapolate_positions=true"
        )
    if world.device.type == "cuda":
        free = torch.cuda.mem_get_info(world.device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lacking = world.max(torch.tensor([cache.nbytes - free], dtype=torch.int64, device=world.device)).item()
    if lacking > 0:
        raise ConfigError(
            f"{what} need a cache of {cache.nbytes / 2**30:.2f} GiB on each rank, {lacking / 2**30:.2f} GiB more than "
            f"a rank has free: take more ranks, or a shorter document"
        )


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _report(world: World, line: str) -> None:
    if world.is_first:
        sys.stdout.flush()
        print(f"ringflash: {line}", file=sys.stderr, flush=True)


def _settings_help() -> str:
    """Every setting with its default and its meaning, which is the text below it in GenerateConfig."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(GenerateConfig)).body[0]
    assert isinstance(tree, ast.ClassDef)
    lines = []
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name):
            default = f"={ast.literal_eval(field.value)}" if field.value is not None else ""
            meaning = " ".join(str(ast.literal_eval(text.value)).split())
            lines.append(f"  {field.target.id + default:<28} {meaning}")
    return "\n".join(lines)


if __name__ == "__main__":
    with failure.one_line(os.getppid()):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to resume
        main(sys.argv[1:])
