"""Mixture: several corpora as one, each with its share of the sequences.

Every sequence comes from a single source. The n-th sequence of a source with share w has the time (n + 1/2) / w, and
the sequences of all sources are ordered by time, so every stretch has the shares to within one sequence per source:

    shares 1/2, 1/4, 1/4        a b c a a b c a a b c a ...

The order is a pure function of the index. A source whose sequences are used up begins its next epoch.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from ringflash.data.config import DataConfig
from ringflash.data.corpus import Corpus, Evaluated, TokenCorpus, entropy, load_corpus
from ringflash.data.documents import check_source
from ringflash.data.packing import Packed, check_labels
from ringflash.data.streamed import StreamedCorpus
from ringflash.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Corpora by their names, and each one's share of the sequences; the shares sum to anything."""

    corpora: Mapping[str, TokenCorpus]
    shares: tuple[float, ...]

    @cached_property
    def digest(self) -> str:
        """Of all documents, in the order of the sources, and of the shares."""
        made_of = repr([[(corpus.digest, corpus.packing) for corpus in self.corpora.values()], self.shares])
        return hashlib.sha256(made_of.encode()).hexdigest()[:16]

    def packed(self, seed: int, index: int, length: int) -> Packed:
        """See `Corpus`."""
        source, number = locate(self.shares, index)
        return [*self.corpora.values()][source].packed(seed, number, length)

    def epoch_length(self, length: int) -> int:
        """The number of sequences in all sources together. If shares differ from sizes, some repeat within an epoch."""
        return sum(corpus.epoch_length(length) for corpus in self.corpora.values())

    def source_lengths(self, length: int) -> dict[str, float]:
        """See `Corpus`."""
        total = sum(self.shares)
        return {
            name: corpus.epoch_length(length) * total / share
            for (name, corpus), share in zip(self.corpora.items(), self.shares, strict=True)
        }

    def description(self, length: int) -> list[str]:
        """Two lines on each source."""
        total = sum(self.shares)
        return [
            line
            for (name, corpus), share in zip(self.corpora.items(), self.shares, strict=True)
            for line in corpus.description(length, f"{name}, {share / total:.1%} of the sequences: ")
        ]

    @property
    def sources(self) -> list[str]:
        """See `Evaluated`."""
        return [*self.corpora]

    def source_of(self, index: int) -> str:
        """See `Evaluated`."""
        return self.sources[locate(self.shares, index)[0]]

    def unigram_entropy(self) -> float:
        """See `Evaluated`."""
        unigrams = [corpus.unigram() for corpus in self.corpora.values()]
        frequencies = np.zeros(max(map(len, unigrams)))
        for counts, share in zip(unigrams, self.shares, strict=True):
            frequencies[: len(counts)] += share * counts / max(counts.sum(), 1)
        return entropy(frequencies)


def load_corpora(config: DataConfig, *, verify: bool = True) -> tuple[Corpus, Evaluated | None]:
    """What `config` trains on, and what it evaluates on, if anything; see `load_corpus`.

    Raises ConfigError as it does, and for documents that do not fill a sequence; it names the source.
    """
    loaded = {}
    for name, part in config.parts().items() if not config.stream else ():
        with _named(f"data.sources.{name}" if name else ""):
            loaded[name] = load_corpus(part, verify=verify)
    training: Corpus = (
        StreamedCorpus(config) if config.stream else _mixed(config, {name: x[0] for name, x in loaded.items()})
    )
    if (own := config.evaluated()) is not None:
        with _named("data.evaluation"):
            held_out = replace(load_corpus(own, verify=verify)[0], split="evaluation")
            held_out.epoch_length(config.sequence_length)
            check_labels(held_out, config.sequence_length)
        return training, held_out
    return training, _mixed(config, {name: splits[1] for name, splits in loaded.items()}) if config.held_out else None


def first_epoch(corpus: Corpus, count: int, length: int) -> Iterator[int]:
    """Of the first `count` sequences, those in which a source's documents come for the first time.

    With data.packing=whole, each epoch of a source has the same documents.
    """
    if not isinstance(corpus, Mixture):
        yield from range(min(count, corpus.epoch_length(length)))
        return
    sizes = [source.epoch_length(length) for source in corpus.corpora.values()]
    for index in range(count):
        source, number = locate(corpus.shares, index)
        if number < sizes[source]:
            yield index


def check_sources(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError for a source that has no files, or whose first record this tokenizer cannot encode."""
    own = config.evaluated()
    named = {f"data.sources.{name}" if name else "": part for name, part in config.parts().items()}
    for name, part in (named | ({} if own is None else {"data.evaluation": own})).items():
        with _named(name):
            check_source(part, tokenizer)


def _mixed(config: DataConfig, corpora: dict[str, TokenCorpus]) -> Evaluated:
    """The corpora as one."""
    sizes = []
    for name, corpus in corpora.items():
        with _named(f"data.sources.{name}" if name else ""):
            sizes.append(float(corpus.epoch_length(config.sequence_length)))
            check_labels(corpus, config.sequence_length)
    if not config.sources:
        return corpora[""]
    weights = [source.weight for source in config.sources.values() if source.weight is not None]
    return Mixture(corpora, tuple(weights or sizes))


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Errors begin with the source's name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}" if source else str(error)) from error


def locate(shares: tuple[float, ...], index: int) -> tuple[int, int]:
    """The source of the index-th sequence, and the sequence's number in that source.

    >>> "".join("abc"[locate((2, 1, 1), i)[0]] for i in range(12))
    'abcaabcaabca'
    """
    total = sum(shares)
    time = max(0.0, index - len(shares)) / total  # before it, `index` sequences at most
    counts = [_before(time, share) for share in shares]
    heap = [((count + 0.5) / share, source) for source, (count, share) in enumerate(zip(counts, shares, strict=True))]
    heapq.heapify(heap)
    for _ in range(index - sum(counts)):
        source = heap[0][1]
        counts[source] += 1
        heapq.heapreplace(heap, ((counts[source] + 0.5) / shares[source], source))
    source = heap[0][1]
    return source, counts[source]


def _before(time: float, share: float) -> int:
    """How many sequences of a source come before a time."""
    count = max(0, int(time * share + 0.5) - 1)
    while (count + 0.5) / share < time:
        count += 1
    return count
