"""The fastest kernel that can do the request is taken; one that is named says why it cannot."""

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
    for deterministic in (False, True):
        assert kernels._load("hopper", deterministic).backward.keywords == {"deterministic": deterministic}


@pytest.mark.gpu
def test_a_hopper_gpu_gets_the_hopper_kernel_for_16_bits_and_the_portable_one_for_fp32():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")
    assert kernels.select(*request(torch.bfloat16, "cuda")).name == "hopper"
    assert kernels.select(*request(torch.float32, "cuda")).name == "portable"
