"""Best-fit packing: each document goes into the sequence that it fills best, the longest documents first.

    lengths 5 4 3 2 1 1, capacity 8        5 3 | 4 2 1 1

The free space that is smallest, but large enough, is taken; without one, a new sequence begins. Sequences are found by
their free space, of which there are few, so a million documents take about two seconds. (arXiv:2404.10830)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> tuple[list[int], int]:
    """The number of the sequence that each document goes into, and how many sequences there are.

    lengths: descending, each at most `capacity`. The result depends on nothing else.
    """
    spaces: list[int] = []  # of sequences that are not full, ascending, each once
    with_space: dict[int, list[int]] = {}  # the sequences of each space
    chosen, count = [], 0
    for length in lengths:
        place = bisect_left(spaces, length)
        if place == len(spaces):
            sequence, space = count, capacity
            count += 1
        else:
            space = spaces[place]
            sequence = with_space[space].pop()
            if not with_space[space]:
                del spaces[place], with_space[space]
        left = space - length
        if left:
            if left not in with_space:
                insort(spaces, left)
                with_space[left] = []
            with_space[left].append(sequence)
        chosen.append(sequence)
    return chosen, count
