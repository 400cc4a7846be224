"""TokenCorpus: the documents of one split, as a view of memory-mapped tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ringflash.data.documents import DataConfig, tokenised
from ringflash.errors import ConfigError

BLOCK = 1 << 22  # tokens counted at once


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Some of the documents in a flat array of tokens.

    Fields: tokens uint16 or uint32 [all tokens]; offsets int64 [all documents + 1]; selection int64 [documents], the
    numbers of the documents in this split, ascending; vocabulary, the highest token id of the whole corpus + 1; digest,
    of all documents' tokens; source and split, for messages.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    selection: np.ndarray
    vocabulary: int
    digest: str = ""
    source: str = "memory"
    split: str = "training"

    def __len__(self) -> int:
        return len(self.selection)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens in each document of the split, int64 [documents]."""
        return self.offsets[self.selection + 1] - self.offsets[self.selection]

    @cached_property
    def total(self) -> int:
        """Tokens in the split."""
        return int(self.lengths.sum())

    def document(self, i: int) -> np.ndarray:
        """The tokens of the split's i-th document, a view."""
        number = self.selection[i]
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def unigram_entropy(self) -> float:
        """Nats per token of the split under its own token frequencies: the loss of a model that ignores context."""
        counts = np.zeros(self.vocabulary, np.int64)
        cuts = np.searchsorted(self.lengths.cumsum(), np.arange(BLOCK, self.total, BLOCK))
        for group in np.split(np.arange(len(self)), cuts):
            if len(group):
                tokens = np.concatenate([self.document(i) for i in group])
                counts += np.bincount(tokens, minlength=self.vocabulary)
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())


def load_corpus(config: DataConfig, *, verify: bool = True) -> tuple[TokenCorpus, TokenCorpus]:
    """The training and the held-out documents of `config`, tokenised first if they are not in the cache.

    The split depends only on `config.seed`, `config.held_out` and the number of documents. verify: compare the cached
    tokens with their digest, which reads them all; one process per machine is enough. Raises ConfigError for input that
    cannot be used, or for too few documents to hold one out.
    """
    tokens, offsets, contents = tokenised(config, verify=verify)
    count = len(offsets) - 1
    if config.held_out and count < 2:
        raise ConfigError(
            f"data.path={config.path} holds {count} document, and data.held_out={config.held_out} keeps one for"
            " evaluation; give 2 or more, or set data.held_out=0"
        )
    kept = min(max(1, round(count * config.held_out)), count - 1) if config.held_out else 0
    order = np.random.default_rng(config.seed).permutation(count)
    return tuple(  # type: ignore[return-value]
        TokenCorpus(
            tokens=tokens,
            offsets=offsets,
            selection=np.sort(selection),
            vocabulary=contents["vocabulary"],
            digest=contents["digest"],
            source=config.path,
            split=split,
        )
        for split, selection in (("training", order[kept:]), ("evaluation", order[:kept]))
    )
