"""Train a language model on long contexts.

    python train.py                                                         # one GPU, or the CPU
    python train.py experiment=debug                                        # seconds on a CPU
    torchrun --nproc-per-node 8 train.py experiment=qwen3-0.5b-128k         # eight GPUs of one machine
    sbatch launch/slurm.sh experiment=llama3-8b-256k-8gpus data.path=corpus data.tokenizer=folder     # Slurm

    python train.py --help                  # every setting, with its type, default and meaning
    python train.py --print optim.lr=1e-4   # check the settings, and show what they resolve to
    WORLD_SIZE=64 LOCAL_WORLD_SIZE=8 python train.py --print ...    # on 64 GPUs, 8 per machine: grid, step, memory

Settings are key=value, such as optim.lr=1e-4, or group=option, such as model=qwen3-0.5b. A value is taken as typed and
needs no quotes except the shell's.
"""

import io
import os
import signal
import sys

PARENT = os.getppid()  # a launcher, which may end during the seconds of the imports
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted import prints no traceback

from ringflash.distributed import failure  # noqa: E402

OPTIONS = ("--print", "--help", "-h")


def main() -> None:
    """Compose the configuration, check it, train."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # which may not have every character of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    # deepspeed's launcher adds --local_rank, which the environment holds too
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    options = [argument for argument in arguments if argument.startswith("-")]
    if options:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `--help | head`, which ends before all is printed
    with failure.one_line(PARENT):
        from ringflash.errors import ConfigError

        if unknown := [option for option in options if option not in OPTIONS]:
            raise ConfigError(f"{unknown[0]} is not an option: settings are key=value, see --help")
        import torch

        from ringflash.training.compose import compose

        if {"--help", "-h"} & {*options}:
            from ringflash.training.help import settings_help

            print(f"{__doc__}\n{settings_help()}")
            return
        from ringflash.training import stop
        from ringflash.training.loop import fit
        from ringflash.training.mismatches import mismatches
        from ringflash.training.preflight import check_inputs, planned, unchecked

        config, resolved = compose([argument for argument in arguments if argument not in options])
        if "--print" in options:
            device = torch.device("cuda") if torch.cuda.is_available() else None
            inputs = check_inputs(config, device)
            print(resolved.rstrip())
            plan = planned(config, inputs[0]) if "WORLD_SIZE" in os.environ else []
            for line in plan + mismatches(config, *inputs) + unchecked(device):
                print(line, file=sys.stderr)
            return
        stop.install_handler()
        if not fit(config, resolved):
            sys.exit(stop.exit_code())


if __name__ == "__main__":
    main()
