"""StreamedCorpus: a corpus too large to tokenise before training. Each file is tokenised shortly before its use.

    order of an epoch       c        a        b              drawn from (seed, epoch)
    tokens on the disk      read     ahead
    ledger.json             12 sequences: where a begins     known once a file is tokenised

Each file is packed as a corpus of its own (`pack`). The n-th sequence therefore depends only on the files and the seed,
not on the number of ranks. The ledger records the number of sequences of each file, so that a resumed run tokenises the
file that it stopped in, and none before it. A file's tokens are deleted when the stream is two files further.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import threading
from contextlib import AbstractContextManager
from pathlib import Path

from ringflash.data.config import DataConfig, SourceConfig
from ringflash.data.corpus import TokenCorpus, load_corpus
from ringflash.data.documents import cache_folder, find_files, meaning_of
from ringflash.data.packing import Packed, check_labels, epoch_generator, truncated_labels
from ringflash.data.scratch import locked
from ringflash.data.tokenizer import load_tokenizer
from ringflash.errors import ConfigError
from ringflash.files import write_atomically

LEDGER = "ledger.json"


class StreamedCorpus:
    """The files of `config`, each a corpus. digest: covers their names and sizes, the tokenizer and the settings.

    It does not cover data.malformed: a run that ends at a malformed record in its midst can continue without it.

    file, in methods: its number in `files`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.files = [file for file, _ in find_files(config)[0]]
        self.bytes = sum(file.stat().st_size for file in self.files)
        self.digest = self._digest()
        self._folder = Path(config.cache).expanduser() / f"{self.digest}.shards"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._counts: dict[str, int] = self._ledger()
        self._loaded: dict[int, TokenCorpus] = {}
        self._ahead: int | None = None  # the file that a thread tokenises, or has tokenised
        self._reached = (0, 0, 0)  # epoch, place in its order, and the sequences before

    def epoch_length(self, length: int) -> int:
        """Raises ConfigError: it is known once all files are tokenised."""
        raise ConfigError(
            "optim.epochs needs a number of sequences, which data.stream=true does not know: set optim.steps"
        )

    def source_lengths(self, length: int) -> dict[str, float]:
        """See `Corpus`."""
        return {}

    def description(self, length: int) -> list[str]:
        """One line: files and bytes."""
        return [f"{'training':<10} {len(self.files):,} files of {self.bytes:,} bytes, each tokenised ahead of its use"]

    def packed(self, seed: int, index: int, length: int) -> Packed:
        """The index-th sequence of the stream. Raises ConfigError for a file that cannot be used."""
        epoch, place, number = self._find(seed, index)
        file = self._order(seed, epoch)[place]
        corpus = self._corpus(file)
        self._prepare(seed, epoch, place)
        return corpus.packed(seed, epoch * self._counts[str(file)] + number, length)

    def _find(self, seed: int, index: int) -> tuple[int, int, int]:
        """The epoch, the place in its order, and the number in that file of a sequence."""
        epoch, place, before = self._reached if index >= self._reached[2] else (0, 0, 0)
        while True:
            order = self._order(seed, epoch)
            for at in range(place, len(order)):
                count = self._count(order[at])
                if index < before + count:
                    self._reached = (epoch, at, before)
                    return epoch, at, index - before
                before += count
            if before == 0:
                raise ConfigError(
                    f"data.path={self.config.path}: none of its {len(self.files)} files fills a sequence of "
                    f"data.sequence_length={self.config.sequence_length} tokens with something to learn"
                )
            epoch, place = epoch + 1, 0

    def _order(self, seed: int, epoch: int) -> list[int]:
        """The files in the order of an epoch."""
        return epoch_generator(seed, epoch).permutation(len(self.files)).tolist()

    def _count(self, file: int) -> int:
        """The sequences of a file."""
        if str(file) not in self._counts:
            self._counts |= self._ledger()
        if str(file) not in self._counts:
            self._corpus(file)
        return self._counts[str(file)]

    def _corpus(self, file: int) -> TokenCorpus:
        """The documents of a file, which is tokenised first unless it is in the cache."""
        if file not in self._loaded:
            self._loaded[file] = self._tokenised(file)
        return self._loaded[file]

    def _tokenised(self, file: int) -> TokenCorpus:
        """The documents of a file. One process of a machine tokenises it, and the others wait."""
        with self._locked(str(file)):
            corpus, _ = load_corpus(self._part(file), quiet=True)
        length = self.config.sequence_length
        try:
            count = corpus.epoch_length(length)
            check_labels(corpus, length)
        except ConfigError:  # less than a sequence, or nothing to learn
            count = 0
        with self._locked(LEDGER):
            known = self._ledger()
            if known.get(str(file), count) != count:
                raise ConfigError(
                    f"{self.files[file]} has {count} sequences, and had {known[str(file)]} when it was read before: "
                    f"the files of data.stream=true must not change; delete {self._folder} to begin again with them"
                )
            if str(file) not in known and (cut := truncated_labels(corpus, length)):
                print(f"{self.files[file]}: the first {length:,} tokens of {cut:,} documents hold no label", flush=True)
            self._counts = known | {str(file): count}
            write_atomically(self._folder / LEDGER, json.dumps(self._counts))
        return corpus

    def _prepare(self, seed: int, epoch: int, place: int) -> None:
        """Tokenise the next file in a thread, and delete the tokens of the file before the previous one."""
        order = self._order(seed, epoch)
        following = order[place + 1] if place + 1 < len(order) else self._order(seed, epoch + 1)[0]
        wanted = {order[place], following, order[max(place - 1, 0)]}
        for file in [file for file in self._loaded if file not in wanted]:
            del self._loaded[file]
            shutil.rmtree(cache_folder(self._part(file)), ignore_errors=True)
        if following not in self._loaded and following != self._ahead:
            self._ahead = following
            # A daemon: a run that ends does not wait for it, and the next one continues what it leaves.
            threading.Thread(target=self._try, args=(following,), name="next file", daemon=True).start()

    def _try(self, file: int) -> None:
        with contextlib.suppress(ConfigError):  # raised where the file is used
            self._tokenised(file)

    def _part(self, file: int) -> DataConfig:
        return dataclasses.replace(
            self.config, path=str(self.files[file]), stream=False, held_out=0.0, evaluation=SourceConfig()
        )

    def _ledger(self) -> dict[str, int]:
        try:
            return json.loads((self._folder / LEDGER).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}

    def _locked(self, name: str) -> AbstractContextManager[bool]:
        """Holds a lock among the processes and threads of this machine. Without locks, each process tokenises."""
        file = self._folder / f"{name}.lock"
        file.touch()
        return locked(file, wait=True)

    def _digest(self) -> str:
        config, tokenizer = self.config, load_tokenizer(self.config.tokenizer)
        files = [(os.path.relpath(file, config.path), file.stat().st_size) for file in self.files]
        packed = [config.format, config.packing, config.sequence_length]
        return hashlib.sha256(json.dumps([files, packed, meaning_of(config, tokenizer)]).encode()).hexdigest()[:16]
