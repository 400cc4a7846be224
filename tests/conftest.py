"""Fixtures and settings that all tests share."""

import gc
import os

import hypothesis
import pytest
import torch
from tqdm import tqdm

from tests import interpreter
from tests.pool import Pool

tqdm.monitor_interval = 0  # its thread's lock, held during a fork, would stop every bar of the forked process
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
def interpreting():
    """Calls a function, by module and name, in a process whose Triton kernels are interpreted."""
    with interpreter.interpreting() as call:
        yield call


@pytest.fixture(scope="session")
def gpus():
    """A pool of NCCL processes, one per GPU."""
    pool = Pool("nccl")
    yield pool
    pool.close()


@pytest.fixture
def text(tmp_path):
    """A folder of ten small documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "all work and no play makes a dull model. " * (i + 2))
    return folder


def pytest_collection_modifyitems(items):
    """Run modules with slow tests first: if one began last, the other workers would be idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Exclude what was imported from garbage collection."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same random numbers, whichever tests ran before."""
    torch.manual_seed(0)
