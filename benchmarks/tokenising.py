"""Tokenising a corpus, compared with the tokenizer alone on the same cores: seconds, CPU seconds, and memory.

    python benchmarks/tokenising.py --bytes 2e6       # seconds
    python benchmarks/tokenising.py                   # 1 GB of JSONL

The text is files of Python's standard library, cut at random places; a BPE tokenizer of 32000 tokens is trained on
some of them. `alone` is encode_batch_fast of the texts, 16 MB at once, which uses every core. `build` is what
train.py does before its first step, without the import of transformers. Each runs in a separate process. Memory is the
peak of the proportional set sizes (PSS) of all its processes: pages that several share count once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import RESULTS, card, write_json

VOCABULARY = 32000
TRAINED_ON = 800  # files
AT_ONCE = 1 << 24  # characters that the tokenizer alone gets
EVERY = 1.0  # seconds between two looks at the memory, of which each takes 7 ms of CPU per process


def write_corpus(folder: Path, size: float) -> None:
    """corpus.jsonl of `size` bytes, and a tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    texts = [text for file in files if (text := file.read_text(encoding="utf-8", errors="ignore"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:TRAINED_ON], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder / "tokenizer")
    draw, written = random.Random(0), 0
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        while written < size:
            text = draw.choice(texts)
            begin = draw.randrange(len(text))
            part = text[begin : begin + int(draw.lognormvariate(8, 1))]  # 3000 characters in the middle
            written += file.write(json.dumps({"text": part}) + "\n") if part.strip() else 0


def alone(folder: Path) -> dict[str, float]:
    """Seconds and CPU seconds that the tokenizer takes, without reading or keeping anything."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    seconds = cpu = 0.0
    for texts in _texts(folder / "corpus.jsonl"):
        begun, cpu_begun = time.perf_counter(), _cpu_seconds()
        tokenizer.encode_batch_fast(texts)
        seconds += time.perf_counter() - begun
        cpu += _cpu_seconds() - cpu_begun
    return {"alone": seconds, "alone_cpu": cpu}


def _texts(file: Path) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1])
            if size >= AT_ONCE:
                yield texts
                texts, size = [], 0
    yield texts


def build(folder: Path) -> dict[str, float]:
    """Seconds, CPU seconds and tokens of a build."""
    from ringflash.data import DataConfig, load_tokenizer, tokenised

    config = DataConfig(
        path=str(folder / "corpus.jsonl"), tokenizer=str(folder / "tokenizer"), cache=str(folder / "cache")
    )
    load_tokenizer(config.tokenizer)  # imports transformers
    begun, cpu_begun = time.perf_counter(), _cpu_seconds()
    found = tokenised(config)
    seconds, cpu = time.perf_counter() - begun, _cpu_seconds() - cpu_begun
    return {"build": seconds, "build_cpu": cpu, "tokens": len(found.tokens)}


def _cpu_seconds() -> float:
    """CPU seconds, user and system, of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(x.ru_utime + x.ru_stime for x in used)


def _apart(work: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """work(*args), in a separate process, and the peak of the GiB that it and its children held."""
    peak = 0.0
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        running = pool.submit(work, *args)
        while not wait([running], EVERY).done:
            peak = max(peak, _memory())
        return running.result(), peak


def _memory() -> float:
    """GiB of all processes that this one has started."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            total += process.memory_full_info().pss
    return total / 2**30


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9, help="of the corpus (%(default)g)")
    parser.add_argument("--out", type=Path, default=RESULTS / "tokenising.json", help="JSON file (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _apart(write_corpus, folder, args.bytes)
        (by_itself, _), (built, gib) = _apart(alone, folder), _apart(build, folder)
    found = {"bytes": args.bytes, "cores": len(os.sched_getaffinity(0)), **by_itself, **built, "build_gib": gib}
    found |= {"ratio": built["build"] / by_itself["alone"], "ratio_cpu": built["build_cpu"] / by_itself["alone_cpu"]}
    facts = card(torch.device("cpu"), {}, None)
    write_json(args.out, {"card": facts, "run": found})
    print(*(f"{name}: {value}" for name, value in {**facts, **found}.items()), sep="\n")


if __name__ == "__main__":
    main()
