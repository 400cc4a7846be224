"""The fastest kernel that supports the request is selected; a named kernel that does not gives the reason."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ringflash import kernels


def request(dtype=torch.float32, device="cpu"):
    q = torch.zeros(1, 8, 4, 64, dtype=dtype, device=device)
    return q, q[:, :, :2]


def test_a_cpu_gets_plain_torch():
    assert kernels.select(*request()).name == "blocked"


@pytest.mark.parametrize("name", ["hopper", "portable"])
def test_a_named_kernel_that_cannot_says_why(name):
    with pytest.raises(ValueError, match=f"kernel={name} .*got .*cpu"):
        kernels.select(*request(torch.float16), name=name)


def test_an_unknown_kernel_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="kernel=fast is not one of auto, hopper, portable, blocked"):
        kernels.select(*request(), name="fast")


def test_the_deterministic_mode_reaches_the_kernel_whose_gradients_would_differ():
    hopper_backward = pytest.importorskip("ringflash.kernels.hopper_backward")
    from ringflash.kernels import portable_backward

    for deterministic, module in ((False, hopper_backward), (True, portable_backward)):
        kernel = kernels._load("hopper", deterministic)
        assert kernel.backward.keywords == {"deterministic": deterministic}
        assert kernel.round_dq is module.round_dq


def test_the_hopper_kernels_refuse_values_of_another_head_size_by_name(monkeypatch):
    hopper = pytest.importorskip("ringflash.kernels.hopper_parts")
    monkeypatch.setattr(hopper, "arch", lambda q: 90)
    monkeypatch.setattr(hopper, "stride_refusal", lambda q, k, copy_engine: None)
    monkeypatch.setattr(hopper, "request_refusal", lambda q, k, softcap: None)
    q = SimpleNamespace(shape=(1, 8, 4, 64), dtype=torch.bfloat16, is_cuda=True)
    assert hopper.supports(q, q, None, 64) is None
    assert hopper.supports(q, q, None, 32) == (
        "takes values of the keys' head_dim, 64, got 32; kernel=portable takes others"
    )


@pytest.mark.gpu
def test_a_hopper_gpu_gets_the_hopper_kernel_for_16_bits_and_the_portable_one_for_fp32():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    assert kernels.select(*request(torch.bfloat16, "cuda")).name == "hopper"
    assert kernels.select(*request(torch.float32, "cuda")).name == "portable"
    assert kernels.select(*request(torch.bfloat16, "cuda"), value_dim=32).name == "portable"


WITHOUT_TRITON = """
import sys


class Hiding:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hiding())
import torch
import ringflash
from ringflash import kernels

q = torch.randn(1, 8, 2, 32)
out = ringflash.flash_attention(q, q, q, ringflash.IntervalMask.causal(8))
print(torch.equal(out, ringflash.flash_attention(q, q, q, ringflash.IntervalMask.causal(8), kernel="blocked")))
for name in ("portable", "hopper"):
    try:
        kernels.select(q, q, name=name)
    except ValueError as error:
        print(error)
"""


def test_without_triton_auto_takes_plain_torch_and_a_named_kernel_says_what_is_missing():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines() == ["True"] + [
        f"kernel={name} needs Triton 3.6 or newer (No module named 'triton'): pip install triton, or kernel=blocked, "
        "which is plain torch"
        for name in ("portable", "hopper")
    ], ran.stderr


@pytest.mark.parametrize(
    ("query", "key", "softcap", "message"),
    [
        (
            (1, 8, 4, 32),
            (1, 8, 0, 32),
            None,
            "takes query heads a multiple of KV heads, 1 or more of each, got 4 and 0",
        ),
        ((1, 8, 0, 32), (1, 8, 2, 32), None, "got 0 and 2"),
        ((1, 8, 4, 32), (1, 8, 3, 32), None, "got 4 and 3"),
        ((8, 4, 32), (8, 4, 32), None, r"takes q and k as \[B, S, H, D\], got \[8, 4, 32\]"),
        ((2, 8, 4, 32), (1, 8, 4, 32), None, "one batch on one device, got 2 and 1"),
        ((1, 8, 4, 32), (1, 8, 4, 32), float("nan"), "takes as softcap a number above 0, finite in fp32 .* got nan"),
        ((1, 8, 4, 32), (1, 8, 4, 32), "30", "got '30'"),
    ],
)
@pytest.mark.parametrize("name", kernels.FASTEST_FIRST)
def test_every_kernel_refuses_what_none_can_do(name, query, key, softcap, message):
    with pytest.raises(ValueError, match=f"kernel={name} .*{message}"):
        kernels.select(torch.zeros(query), torch.zeros(key), softcap, name)
