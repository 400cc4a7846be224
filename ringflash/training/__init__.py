"""The trainer: configuration, processes, the step, checkpoints, metrics and the loop that ties them together."""

import os
import warnings

import torch

# Read by deepspeed when it is imported: it would otherwise look for accelerators and warn that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# DeepSpeed calls collectives by names that newer torch deprecates, on every step; no user can do anything about it.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
