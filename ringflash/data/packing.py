"""Packing: sequence number `index` of an endless stream, as a pure function of (corpus, seed, index, length).

data.packing decides how documents fill sequences:

    cut         laid end to end and cut every `length` tokens; the pieces of a document are documents of their own
    whole       never cut: packed by best fit (best_fit.py); documents longer than a sequence are dropped
    truncate    as whole, but documents longer than a sequence keep their first `length` tokens
    split       as whole, but documents longer than a sequence become pieces of `length` tokens and a rest; the pieces
                are documents of their own

The order of every epoch is drawn from (seed, epoch). Three documents of 5, 4 and 6 tokens, cut at length 4, and packed
whole at length 8, where the rest of each sequence is padding, in documents of its own without labels:

    cut     a a a a|a b b b|b c c c|c c c        whole    c c c c c c . .|b b b b . . . .|a a a a a . . .
            (4)     (1, 3)  (1, 3)                        (6, 2)          (4, 4)          (5, 3)

With cut, the last tokens of an epoch that do not fill a sequence are left out. With the others, the same lengths
share a sequence in every epoch, but documents of equal length change places, as does the order of sequences.

Pairs (data.preferences) are packed whole, the two documents of each side by side.

No state is carried from one sequence to the next, so any rank can make any sequence at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflash.data.best_fit import best_fit
from ringflash.data.records import IGNORE
from ringflash.data.split import Split
from ringflash.errors import ConfigError

PADDING = 0  # the token of padding, which no other token sees and which predicts nothing
PIECE = 128  # tokens per document of padding: a single long one would cost attention


class Packed(NamedTuple):
    """One packed sequence: tokens and labels int64 [S] on the CPU, and its documents' token counts, which sum to S.

    A token's label is the next token of its document, or the document's own label for that token. The last token of
    each document has the label IGNORE.
    """

    tokens: Tensor
    labels: Tensor
    documents: tuple[int, ...]


class _Plan(NamedTuple):
    """Which lengths share a sequence. Places 0, 1, 2, ... are the pieces in descending order of length.

    kept, begins, lengths: the number of each piece's document, where it begins there, and its length, int64 [pieces].
    There are several pieces of a document with data.packing=split alone. places, ends: int64 [pieces] and [sequences];
    sequence i has places[ends[i - 1]:ends[i]].
    """

    kept: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    ends: np.ndarray


def sequences_per_epoch(corpus: Split, length: int) -> int:
    """The number of sequences of `length` tokens in an epoch. Raises ConfigError if there are none."""
    if corpus.packing == "cut":
        if corpus.total < length:
            raise ConfigError(
                f"data.path={corpus.source} has {corpus.total} tokens for {corpus.split}, fewer than"
                f" data.sequence_length={length}; give more text, a shorter sequence or another data.held_out"
            )
        return corpus.total // length
    if not (count := len(_plan(corpus, length).ends)):
        others = ", or data.packing=truncate, or split for other than conversations" if corpus.middles is None else ""
        raise ConfigError(
            f"data.path={corpus.source} has no {corpus.noun} for {corpus.split} of at most "
            f"data.sequence_length={length} tokens, and data.packing={corpus.packing} drops longer ones: give more "
            f"{corpus.noun}s, a longer sequence{others}"
        )
    return count


def check_labels(corpus: Split, length: int) -> None:
    """Raise ConfigError if no document of the split predicts a token in sequences of `length`."""
    pieces: Iterable[tuple[int, int]] = ((i, 0) for i in range(len(corpus)))
    if corpus.packing != "cut":
        pieces = zip(*_plan(corpus, length)[:2], strict=True)
    if corpus.labels is not None and not any(_predicted(corpus, i, begin, length).any() for i, begin in pieces):
        raise ConfigError(
            f"data.path={corpus.source} has no label among the tokens for {corpus.split} that "
            f"data.packing={corpus.packing} keeps at data.sequence_length={length}: there is nothing to learn; give a "
            f"longer sequence"
        )


def truncated_labels(corpus: Split, length: int) -> int:
    """The number of documents that have labels, but none among the tokens that data.packing=truncate keeps."""
    if corpus.packing != "truncate" or corpus.labels is None:
        return 0
    longer = np.flatnonzero(corpus.lengths > length)
    return sum(bool(_predicted(corpus, i).any() and not _predicted(corpus, i, 0, length).any()) for i in longer)


def _predicted(corpus: Split, i: int, begin: int = 0, length: int | None = None) -> np.ndarray:
    """Whether each of a document's `length` tokens from `begin` on is predicted, except the first, which never is."""
    return corpus.targets(i)[begin:][1:length] != IGNORE


def pack(corpus: Split, seed: int, index: int, length: int) -> Packed:
    """The index-th sequence of `length` tokens, counted over all epochs. Raises ConfigError if an epoch has none."""
    epoch, number = divmod(index, sequences_per_epoch(corpus, length))
    if corpus.packing == "cut":
        return _cut(corpus, *_order(corpus, seed, epoch), number, length)
    chosen, order = _drawn(corpus, seed, epoch, length)
    plan = _plan(corpus, length)
    end = plan.ends[order[number]]
    begin = plan.ends[order[number] - 1] if order[number] else 0
    here = chosen[plan.places[begin:end]]
    if corpus.middles is None:
        parts = [(i, slice(start, start + length)) for i, start in zip(plan.kept[here], plan.begins[here], strict=True)]
    else:
        parts = [(i, half) for i in plan.kept[here] for half in corpus.halves(i)]
    pieces = [corpus.document(i)[part] for i, part in parts]
    targets = [corpus.targets(i)[part] for i, part in parts]
    padding = length - sum(map(len, pieces))
    for count in [PIECE] * (padding // PIECE) + [padding % PIECE] * (padding % PIECE > 0):
        pieces.append(np.full(count, PADDING))
        targets.append(np.full(count, IGNORE))
    return _packed(pieces, targets)


def _cut(corpus: Split, order: np.ndarray, ends: np.ndarray, number: int, length: int) -> Packed:
    """Sequence `number` of an epoch whose documents lie end to end."""
    start, stop = number * length, (number + 1) * length
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
    pieces, targets = [], []
    for i in range(first, last + 1):
        document, target = corpus.document(order[i]), corpus.targets(order[i])
        begin = ends[i] - len(document)
        here = slice(max(start - begin, 0), stop - begin)
        pieces.append(document[here])
        targets.append(target[here])
    return _packed(pieces, targets)


def _packed(pieces: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> Packed:
    """Documents laid end to end. targets: the label of each token, not shifted."""
    documents = tuple(len(piece) for piece in pieces)
    tokens, labels = (torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (pieces, targets))
    labels = labels.roll(-1)
    labels[torch.tensor(documents).cumsum(0) - 1] = IGNORE
    return Packed(tokens, labels, documents)


@lru_cache(maxsize=4)  # the current epoch and the next, for training and for evaluation
def _order(corpus: Split, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's order of documents, and where each ends in it: int64 [documents], twice."""
    order = epoch_generator(seed, epoch).permutation(len(corpus))
    return order, corpus.lengths[order].cumsum()


@lru_cache(maxsize=4)
def _drawn(corpus: Split, seed: int, epoch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's piece at each place of the plan, and its order of sequences, int64 [pieces] and [sequences]."""
    plan, generator = _plan(corpus, length), epoch_generator(seed, epoch)
    pieces = generator.permutation(len(plan.kept))
    by_length = np.argsort(-plan.lengths[pieces], kind="stable")
    return pieces[by_length], generator.permutation(len(plan.ends))


def epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    """What draws an epoch's orders."""
    # epoch + 1, because numpy draws the same from (seed, 0) as from seed, which draws the split
    return np.random.default_rng((seed, epoch + 1))


@lru_cache(maxsize=4)  # training and evaluation
def _plan(corpus: Split, length: int) -> _Plan:
    """Which lengths share a sequence, the same in every epoch and on every rank."""
    counts = np.ones(len(corpus), np.int64)  # pieces of each document
    if corpus.packing == "whole":
        counts[corpus.lengths > length] = 0
    elif corpus.packing == "split":
        counts = -(-corpus.lengths // length)
    kept = np.repeat(np.arange(len(corpus)), counts)
    begins = (np.arange(len(kept)) - np.repeat(counts.cumsum() - counts, counts)) * length
    lengths = np.minimum(corpus.lengths[kept] - begins, length)
    chosen, count = best_fit((-np.sort(-lengths)).tolist(), length)
    places = np.argsort(chosen, kind="stable") if count else np.empty(0, np.int64)
    return _Plan(kept, begins, lengths, places, np.bincount(chosen, minlength=count).cumsum() if count else places)


def summary(corpus: Split, length: int, name: str = "") -> list[str]:
    """Two lines about a split: its sequences and how full they are, and the distribution of document lengths.

    name: that of a source, if there are several.
    """
    sequences, documents, tokens = sequences_per_epoch(corpus, length), len(corpus), corpus.total
    longer = int((corpus.lengths > length).sum())
    kept = sequences * length if corpus.packing == "cut" else int(_plan(corpus, length).lengths.sum())
    fates = {"cut": "are cut", "split": "are split", "whole": "are dropped", "truncate": f"keep their first {length:,}"}
    fate = fates[corpus.packing]
    lost = f"; {longer:,} longer than {length:,} tokens {fate}" if longer else ""
    lost += f", which hold no label of {cut:,}" if (cut := truncated_labels(corpus, length)) else ""
    bounds = 2 ** np.arange(6, 25)
    at_most = np.searchsorted(np.sort(corpus.lengths), bounds, side="right")
    first = max(0, int(np.searchsorted(at_most, documents // 100, side="right")) - 1)
    last = int(np.searchsorted(at_most, documents)) + 1
    counts = [f"{bound:,}: {count:,}" for bound, count in zip(bounds, at_most, strict=True)][first:last]
    predicted = ""
    if corpus.labels is not None:
        count = sum(int((corpus.targets(i) != IGNORE).sum()) for i in range(documents))
        predicted = f", {count:,} of them predicted"
    return [
        f"{corpus.split:<10} {name}{documents:,} {corpus.noun}s of {tokens:,} tokens{predicted}, in {sequences:,} "
        f"sequences per epoch, {kept / sequences / length:.1%} full{lost}",
        f"{'':<10} {corpus.noun}s by length, at most: {', '.join(counts)}",
    ]
