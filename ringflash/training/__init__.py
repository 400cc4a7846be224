"""The trainer.

loop                        the steps of a run, top to bottom
run, finish                 how a run is opened, and how it ends
config, compose             all settings, typed; composed of YAML files and a command line
overrides, help             the grammar of a command line; the settings as --help lists them
other_names                 the names that other trainers have for settings
preflight, mismatches       what is refused before anything is allocated; what a pretrained model makes doubtful
memory, estimate            the settings that save GPU memory; the memory and disk that a run will take
engine, loss, optimizers    the model under DeepSpeed
zero3                       with ZeRO 3, a model that is never whole in one rank's memory
step, evaluation, needle    one optimizer step, the held-out loss, and needles in long texts
neftune                     noise that is added to embeddings
preferences                 training on pairs of a chosen and a rejected answer, such as DPO
positions                   the loss by position in a document
meter, flops, metrics       a step's figures, and where they are written; loss_plot draws them
run_folder                  the folder of a run
checkpoints                 what a run can be resumed from, also if ranks or ZeRO stage change
export                      the trained model as a Hugging Face folder
stop                        how a run ends early with a checkpoint
divergence, out_of_memory   two ways in which it fails: losses that are not finite, and full GPUs
"""

import os
import warnings

import torch

# deepspeed reads it on import; without it, deepspeed looks for accelerators and warns that it found none.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# On every step DeepSpeed calls collectives by names that newer torch deprecates; a user cannot change that.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
