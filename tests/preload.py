"""The imports of the fork server. Processes forked from it share them, and garbage collection skips them.

DeepSpeed collects garbage in each engine of ZeRO 3, which would take as long as the rest of a small test.
"""

import gc
import importlib

MODULES = [
    # what a run imports
    *("ringflash.training.loop", "ringflash.training.preflight", "matplotlib.figure", "pyarrow.parquet"),
    *(f"ringflash.kernels.{name}_{way}" for name in ("portable", "hopper") for way in ("forward", "backward")),
    *("matplotlib.backends.backend_agg", "torch.distributed.run", "torch.distributed.fsdp"),
    # what an engine imports when it is made
    *("deepspeed.module_inject.auto_ep_layer", "deepspeed.moe.ep_repack", "deepspeed.ops.op_builder.all_ops"),
    *("deepspeed.ops.triton_ops.autoep_fused_token_ops", "deepspeed.runtime.zero.muon.muon_optimizer"),
    # what modules of tests import, which ranks import to call their functions
    *("pytest", "hypothesis", "tests.training.engines", "tests.training.runs"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3")),
    *("transformers.models.auto.modeling_auto", "transformers.models.byt5.tokenization_byt5"),
]

for module in MODULES:
    importlib.import_module(module)
importlib.import_module("ringflash.training.compose").compose([])  # Hydra looks for its plugins once
gc.freeze()
