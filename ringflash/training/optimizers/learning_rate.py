"""The learning rate of a step, as a fraction of the peak, by the name of its schedule.

warm-up, linear to the peak, then     cosine                 half a cosine down to final_lr
                                      linear                 a line down to final_lr
                                      constant               the peak
                                      warmup_stable_decay    the peak, and in the last steps a line to final_lr
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")


def fraction_of_peak(name: str, step: int, steps: int, warmup: int, decay: int, final: float) -> float:
    """The learning rate of `step`, counted from 1 to `steps`, as a fraction of the peak.

    warmup: steps, the last of which has the peak; 0 is as 1. decay: steps of the last line of warmup_stable_decay.
    final: the fraction of the last step. It depends on the step alone, so a resumed run continues it.

    >>> [round(fraction_of_peak("cosine", step, 6, 2, 0, 0.5), 3) for step in range(1, 7)]
    [0.5, 1.0, 0.927, 0.75, 0.573, 0.5]
    >>> [fraction_of_peak("linear", step, 6, 2, 0, 0.5) for step in range(1, 7)]
    [0.5, 1.0, 0.875, 0.75, 0.625, 0.5]
    >>> [fraction_of_peak("constant", step, 6, 2, 0, 0.5) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    >>> [fraction_of_peak("warmup_stable_decay", step, 6, 2, 2, 0.5) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 1.0, 0.75, 0.5]
    """
    warmup = max(warmup, 1)
    if step <= warmup:
        return step / warmup
    begin = steps - decay if name == "warmup_stable_decay" else warmup
    done = min(max(step - begin, 0) / max(steps - begin, 1), 1.0)
    if name == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return 1.0 if name == "constant" else 1 - (1 - final) * done
