"""The trainer: configuration, processes, the step, checkpoints, metrics and the loop that ties them together."""

import os

import torch

# Read by deepspeed when it is imported: it would otherwise look for accelerators and warn that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
