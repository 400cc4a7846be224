"""The trainer.

config, overrides, help     the settings: typed, read from a command line, listed
memory, estimate            the settings that save GPU memory; the memory and disk that a run will take
preflight                   what is refused before anything is allocated, and the log of what will run
world, without_timeout      ring, Ulysses and replicas; work without a timeout
failure, stop               how a run fails, and how it ends early with a checkpoint
engine, loss, optimizer     the model under DeepSpeed
step, evaluation, needle    one optimizer step, the held-out loss, and needles in long texts
positions                   the loss by position in a document
meter, flops, metrics       a step's figures, and where they are written
checkpoint, reshard         what a run can be resumed from, also if ranks or ZeRO stage change
export                      what a run leaves
loop                        the run, top to bottom
"""

import os
import warnings

import torch

# deepspeed reads it on import; without it, deepspeed looks for accelerators and warns that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# On every step DeepSpeed calls collectives by names that newer torch deprecates; a user cannot change that.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
