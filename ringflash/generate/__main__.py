"""Read a long document with a language model, and answer prompts on it.

    python -m ringflash.generate model=FOLDER document=book.txt prompt="Who is the murderer?"
    torchrun --nproc-per-node 4 -m ringflash.generate model=FOLDER document=book.txt prompt="..."   # over 4 GPUs
    python -m ringflash.generate model=FOLDER document=book.txt prompt="First?" prompt="Second?"    # read once
    cat book.txt | python -m ringflash.generate model=FOLDER document=- prompt="Who?"
    python -m ringflash.generate model=FOLDER document=book.txt prompt=-                            # a prompt per line

FOLDER is a model's, or a LoRA adapter's, which is merged into its model.

The model continues the document's tokens followed by the prompt's, with nothing in between. With chat=true, both are
wrapped in a turn of the tokenizer's chat template. Tokens are printed on standard output as they are generated, times
and memory on standard error. Several ranks share the reading of the document, and each keeps its part of the KV cache
(`ringflash.models.RingCache`).

Settings are key=value:
"""

from ringflash.generate.answers import GenerateConfig, run
from ringflash.generate.command import command, start


def main(arguments: list[str]) -> None:
    """Parse the settings, read the document, answer the prompts."""
    command(GenerateConfig, __doc__ or "", run, arguments)


if __name__ == "__main__":
    start(main)
