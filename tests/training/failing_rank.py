"""train.py with one more argument, the first, which says how a rank fails.

raise, hang     in its fifth tile rank 1 raises, or sleeps: two hops of two halves of the heads are a layer, so that is
                in layer 1, whose keys are already on their way
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from ringflash.kernels import blocked

calls = 0
failure = sys.argv.pop(1)
forward = blocked.forward


def failing_forward(*args, **options):
    """The block kernel, until it is not."""
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 5:
        if failure == "hang":
            time.sleep(1000)
        raise ArithmeticError("the fifth tile is broken")
    return forward(*args, **options)


blocked.forward = failing_forward
train.main()
