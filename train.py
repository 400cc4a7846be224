"""Train a language model on long contexts.

    python train.py                                                         # one GPU, or the CPU
    torchrun --nproc-per-node 8 train.py experiment=qwen3-0.5b-128k         # eight GPUs of one machine
    sbatch launch/slurm.sh experiment=llama3-8b-256k data.path=corpus data.tokenizer=folder     # a Slurm cluster

Settings are key=value, such as optim.lr=1e-4 or model=qwen3-0.5b; --print shows what they come to and ends.
Text is taken as typed: it needs no quotes but the shell's.
"""

import argparse
import os
import signal

PARENT = os.getppid()  # a launcher, which may end during the seconds of the imports
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted import is no error with a traceback

from ringflash.training import failure  # noqa: E402


def main() -> None:
    """Compose the configuration, check it, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--print", action="store_true", help="show the resolved configuration and end")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; the environment tells
    arguments, rest = parser.parse_known_intermixed_args()
    with failure.one_line(PARENT):
        from ringflash.errors import ConfigError

        if rest:
            raise ConfigError(f"{rest[0]} is not an option of train.py: settings are key=value, and --help shows more")
        from ringflash.training.config import compose
        from ringflash.training.loop import check_here, fit

        config, resolved = compose(arguments.settings)
        if arguments.print:
            check_here(config)
            print(resolved.rstrip())
            return
        fit(config, resolved)


if __name__ == "__main__":
    main()
