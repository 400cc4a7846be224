"""Fixtures and settings that all tests share."""

import os

import hypothesis
import pytest
import torch

from tests.pool import Pool

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
hypothesis.settings.register_profile("ringflash", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ringflash")


@pytest.fixture(scope="session")
def ranks():
    """A pool of gloo processes, shared by all tests that need several ranks."""
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def gpus():
    """A pool of NCCL processes, one a GPU."""
    pool = Pool("nccl")
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whatever ran before."""
    torch.manual_seed(0)
