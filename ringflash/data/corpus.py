"""Corpus: what a run trains or evaluates on. TokenCorpus: the packed sequences of one split of one corpus."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from ringflash.data.config import DataConfig
from ringflash.data.documents import tokenised
from ringflash.data.packing import Packed, pack, sequences_per_epoch, summary
from ringflash.data.records import IGNORE
from ringflash.data.split import Split
from ringflash.errors import ConfigError

BLOCK = 1 << 22  # tokens counted at once


class Corpus(Protocol):
    """An endless stream of packed sequences: of one corpus, several (`mixture`), or one file at a time (`streamed`)."""

    @property
    def digest(self) -> str:
        """A digest of everything that decides the sequences, apart from seed and length."""

    def packed(self, seed: int, index: int, length: int) -> Packed:
        """The index-th sequence of `length` tokens, over all epochs. Raises ConfigError if an epoch has none."""

    def epoch_length(self, length: int) -> int:
        """The number of sequences of `length` tokens in an epoch. Raises ConfigError if it is 0 or not known."""

    def source_lengths(self, length: int) -> dict[str, float]:
        """By the name of each source, the training sequences during which it is used once; {} if not known."""

    def description(self, length: int) -> list[str]:
        """Lines for the log: documents, tokens, and how full sequences of `length` tokens are."""


class Evaluated(Corpus, Protocol):
    """A corpus to evaluate on."""

    @property
    def sources(self) -> list[str]:
        """The names of all sources; "" if there is only one."""

    def source_of(self, index: int) -> str:
        """The name of the source of the index-th sequence."""

    def unigram_entropy(self) -> float:
        """Nats per predicted token under the frequencies of these tokens: the loss without any context."""


class TokenCorpus(Split):
    """The packed sequences of one split."""

    packed = pack
    epoch_length = sequences_per_epoch
    description = summary

    def source_lengths(self, length: int) -> dict[str, float]:
        """See `Corpus`."""
        return {"": self.epoch_length(length)}

    @property
    def sources(self) -> list[str]:
        """See `Evaluated`."""
        return [""]

    def source_of(self, index: int) -> str:
        """See `Evaluated`."""
        return ""

    def unigram_entropy(self) -> float:
        """See `Evaluated`."""
        return entropy(self.unigram())

    def unigram(self) -> np.ndarray:
        """How often each token is predicted, int64 [vocabulary], or longer if labels have other tokens."""
        counts = np.zeros(self.vocabulary, np.int64)
        cuts = np.searchsorted(self.lengths.cumsum(), np.arange(BLOCK, self.total, BLOCK))
        for group in np.split(np.arange(len(self)), cuts):
            if len(group):
                targets = np.concatenate([self.targets(i) for i in group])
                found = np.bincount(targets[targets != IGNORE], minlength=len(counts))
                counts = np.pad(counts, (0, len(found) - len(counts))) + found
        return counts


def entropy(frequencies: np.ndarray) -> float:
    """Nats per token drawn with these frequencies, which need not add up to 1."""
    p = frequencies[frequencies > 0] / max(frequencies.sum(), np.finfo(float).tiny)
    return float(-(p * np.log(p)).sum())


def _predicts(labels: np.ndarray) -> bool:
    """Whether any token is predicted; reads up to the first."""
    return any(bool((labels[i : i + BLOCK] != IGNORE).any()) for i in range(0, len(labels), BLOCK))


def load_corpus(config: DataConfig, *, verify: bool = True, quiet: bool = False) -> tuple[TokenCorpus, TokenCorpus]:
    """The training and the held-out documents of `config`, tokenised first if they are not in the cache.

    The split is by record, and depends only on `config.seed`, `config.held_out` and the number of records. verify:
    compare the cached tokens with their digest, which reads them all; one process per machine is enough. Raises
    ConfigError for input that cannot be used, or for too few records to hold one out.
    """
    found = tokenised(config, verify=verify, quiet=quiet)
    offsets, middles, starts = found.offsets, None, found.starts
    if config.preferences:  # two documents per record, which are one here
        offsets, middles, starts = offsets[::2], offsets[1::2], None
    if found.labels is not None and not _predicts(found.labels):
        raise ConfigError(f"data.path={config.path} has labels that are all {IGNORE}: there is nothing to learn")
    documents = len(offsets) - 1
    starts = np.arange(documents) if starts is None else starts
    count = len(starts)
    if config.held_out and count < 2:
        raise ConfigError(
            f"data.path={config.path} holds {count} document, and data.held_out={config.held_out} keeps one for"
            " evaluation; give 2 or more, or set data.held_out=0"
        )
    kept = min(max(1, round(count * config.held_out)), count - 1) if config.held_out else 0
    order = np.random.default_rng(config.seed).permutation(count)
    held_out = np.zeros(count, bool)
    held_out[order[:kept]] = True
    of_document = held_out[np.searchsorted(starts, np.arange(documents), side="right") - 1]
    digests = filter(None, (found.contents["digest"], found.contents["labels_digest"]))
    whole = TokenCorpus(
        found.tokens, offsets, np.arange(documents), found.contents["vocabulary"], digest="-".join(digests),
        source=str(config.path), labels=found.labels, packing=config.packing, middles=middles,
    )  # fmt: skip
    return (
        dataclasses.replace(whole, selection=np.flatnonzero(~of_document)),
        dataclasses.replace(whole, selection=np.flatnonzero(of_document), split="evaluation"),
    )
