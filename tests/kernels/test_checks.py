"""Every kernel refuses a tensor that does not fit in its own name, with what was given and what is possible."""

from __future__ import annotations

import dataclasses
import importlib
from unittest import mock

import pytest
import torch

from ringflash import IntervalMask
from ringflash.partial import Partial

Q = torch.zeros(1, 8, 4, 64, dtype=torch.float16)
K = torch.zeros(1, 8, 2, 64, dtype=torch.float16)
ROWS = torch.zeros(1, 4, 8)
INTERVALS = IntervalMask.causal(8).intervals("cpu")
WRONG = {
    "v": ({"v": K[:, :7]}, r"v as \[1, 8, 2, 64\], torch.float16, .*got \[1, 7, 2, 64\]"),
    "scale": ({"scale": 0.0}, "as scale a number above 0, .*got 0.0"),
    "intervals": (
        {"intervals": dataclasses.replace(INTERVALS, end=INTERVALS.end.long())},
        r"intervals.end as \[1 or 1, 8\], torch.int32, .*torch.int64",
    ),
    "carry": ({"carry": Partial(Q, ROWS)}, r"carry.out as \[1, 8, 4, 64\], torch.float32, .*torch.float16"),
    "out": ({"out": Q.double()}, r"out as \[1, 8, 4, 64\], float16, .*torch.float64"),
    "seen": (
        {"out": Q, "seen": torch.zeros(2, 1, 8).int()},
        r"seen as \[2, 1 or 1, 9\], torch.int32, .*got \[2, 1, 8\]",
    ),
    "dout": ({"dout": Q[:, :, :2]}, r"dout as \[1, 8, 4, 64\], .*got \[1, 8, 2, 64\]"),
    "delta": ({"delta": ROWS[:, :, :7]}, r"delta as \[1, 4, 8\], .*got \[1, 4, 7\]"),
    "center": ({"center": K[:, :1].float()}, r"center as \[1, 1, 2, 64\], torch.float16, .*torch.float32"),
    "dk": ({"dk": torch.zeros(1, 8, 4, 64)}, r"dk as \[1, 8, 2, 64\], torch.float32, .*got \[1, 8, 4, 64\]"),
    "dv": ({"dk": K, "dv": K[:, :7]}, r"dv as \[1, 8, 2, 64\], torch.float16, .*got \[1, 7, 2, 64\]"),
    "dk alone in 16 bits": (
        {"dk": K},
        r"dk and dv both as torch.float32, .*or both as torch.float16, .*got torch.float16 and torch.float32",
    ),
}


@pytest.mark.parametrize("kernel", ["portable", "hopper"])
@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_does_not_fit_is_refused_in_the_kernels_name(name, kernel):
    backward = name.startswith(("d", "center"))
    module = importlib.import_module(f"ringflash.kernels.{kernel}_{'backward' if backward else 'forward'}")
    parts = importlib.import_module(f"ringflash.kernels.{kernel}_parts")
    arguments = {"q": Q, "k": K, "v": K, "intervals": INTERVALS, "scale": 0.125}
    if backward:
        gradients = {f"d{x}": torch.zeros(y.shape) for x, y in (("q", Q), ("k", K), ("v", K))}
        arguments |= {"dout": Q, "lse": ROWS, "delta": ROWS, **gradients}
    wrong, told = WRONG[name]
    # Only what is checked before a launch runs here: a Hopper GPU is not needed.
    with (
        mock.patch.object(parts, "supports", return_value=None),
        pytest.raises(ValueError, match=f"^kernel={kernel} takes {told}"),
    ):
        (module.backward if backward else module.forward)(**arguments | wrong)
