"""Building the token cache: one process reads records and splits long ones, workers parse and tokenise them, and the
results are written in order. A build that stopped is continued by the next one.

    records  --split-->  groups of about GROUP characters  --workers-->  cache.Group  --in order-->  cache.Writer
                                                                                          progress.json

`progress.json` records how far the files have been read and written. It is replaced every few seconds, once everything
before it is on disk; a build that continues truncates what was written later. Memory is bounded by the number of
waiting groups and by their size, GROUP, however long a text is. Only JSON records and table rows are held whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from ringflash.data import cache
from ringflash.data.cache import Written
from ringflash.data.formats import Lines, Record, RecordError, records
from ringflash.data.records import Reading
from ringflash.errors import ConfigError, reason
from ringflash.files import write_atomically

GROUP = 1 << 20  # characters that a worker tokenises at once
AHEAD = 3  # groups per worker, waiting or in progress
SECONDS = 5.0  # between two updates of progress.json
PROGRESS = "progress.json"

T = TypeVar("T")
Made = TypeVar("Made")
Source = tuple[Path, str]  # a file, and the format to read it by
Part = tuple[str, Any]  # where it is in its file, and a part of a record, or why it cannot be read


class Job(NamedTuple):
    """A build. guessed: whether formats follow suffixes. size: the tokenizer's. malformed: refuse or skip."""

    sources: Sequence[Source]
    reading: Reading
    guessed: bool
    size: int
    malformed: str
    quiet: bool = False


@dataclasses.dataclass
class Progress:
    """How far a build has come: files read, parts read of the next file, what is written, and counts of findings."""

    files: int = 0
    parts: int = 0
    written: Written = dataclasses.field(default_factory=Written)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    skipped: int = 0
    first_skipped: str = ""

    def save(self, folder: Path) -> None:
        """Replace progress.json in a folder."""
        found = vars(self) | {"written": vars(self.written)}  # asdict takes a Counter apart
        write_atomically(folder / PROGRESS, json.dumps(found))


def read_progress(folder: Path) -> Progress:
    """The progress in a folder; that of a new build if there is none."""
    try:
        found = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Progress()
    return Progress(**found | {"written": Written(**found["written"]), "counts": Counter(found["counts"])})


def take_over(folder: Path, others: Iterable[Path]) -> None:
    """Copy the most advanced of other unfinished folders, if there is one. Its builder may still be writing."""
    found = [(read_progress(other), other) for other in others]
    for progress, other in sorted(found, key=lambda x: x[0].written.tokens, reverse=True):
        if not progress.written.tokens:
            return
        try:
            for name in (cache.TOKENS, cache.LENGTHS, cache.FLAGS, *[cache.LABELS] * progress.written.labelled):
                shutil.copyfile(other / name, folder / name)
        except FileNotFoundError:  # finished meanwhile
            continue
        progress.save(folder)
        return


def build(folder: Path, job: Job) -> tuple[Progress, dict[str, Any]]:
    """Write the arrays into `folder`, continuing its progress. Returns the progress, and the contents for `cache.seal`.

    Raises ConfigError for input that cannot be used.
    """
    progress, saved = read_progress(folder), time.monotonic()
    encoding = contextlib.closing(_encode(job, _groups(_parts(job, progress))))
    with cache.Writer(folder, job.size, progress.written) as writer, encoding as encoded:
        for (files, parts), (group, counts, errors) in encoded:
            if errors and job.malformed == "refuse":
                raise _skippable(errors[0])
            writer.add(group)
            progress.files, progress.parts = files, parts
            progress.counts.update(counts)
            progress.skipped += len(errors)
            progress.first_skipped = progress.first_skipped or (str(errors[0]) if errors else "")
            if time.monotonic() - saved >= SECONDS:
                writer.sync()
                progress.save(folder)
                saved = time.monotonic()
        contents = writer.finish() if progress.written.tokens else {}
    (folder / PROGRESS).unlink(missing_ok=True)
    return progress, contents


def _skippable(error: RecordError) -> RecordError:
    return RecordError(f"{error}; data.malformed=skip leaves such records out")


def try_first(job: Job) -> None:
    """Encode the first record, and write nothing. Raises ConfigError if it cannot be used.

    A wrong field or chat template is then found before the model is loaded. Large JSON arrays, which are read whole,
    are left to `build`.
    """
    sources = [(file, form) for file, form in job.sources if form != "json" or file.stat().st_size <= GROUP]
    parts = itertools.chain.from_iterable(_split(job, file, form) for file, form in sources)
    with _without_threads():
        for where, part in itertools.islice(_parsed(job.reading, parts), 1):
            if isinstance(part, RecordError):
                raise part
            try:
                deque(job.reading.encode(job.reading.parse(where, part)), maxlen=0)
            except RecordError as error:
                raise _skippable(error) from error


# -- records to groups


def _parts(job: Job, progress: Progress) -> Iterator[tuple[tuple[int, int], Part]]:
    """The parts of all records from `progress` on, each with the progress after it; a bar shows the bytes read.

    An error is yielded in place of its record.
    """
    sizes = [file.stat().st_size for file, _ in job.sources]
    done, begun = sum(sizes[: progress.files]), progress.files
    with tqdm(desc="tokenising", total=sum(sizes), initial=done, unit="B", unit_scale=True, disable=job.quiet) as bar:
        for number, (file, form) in enumerate(job.sources[begun:], begun):
            passed, left = progress.parts if number == begun else 0, sizes[number]
            for count, part in enumerate(_split(job, file, form), 1):
                step = min(left, _size(part[1]))
                bar.update(step)
                left -= step
                if count > passed:
                    yield (number, count), part
            bar.update(left)


def _split(job: Job, file: Path, form: str) -> Iterator[Part]:
    """The parts of a file's records. Workers parse lines of JSON, unless one is longer than a group."""
    try:
        for where, found in records(file, form, job.reading.fields, job.guessed):
            if isinstance(found, Lines) and max(map(len, found.lines), default=0) <= GROUP:
                yield where, found
            elif isinstance(found, Lines):
                yield from _parts_of(job.reading, found.records(job.reading.fields))
            else:
                yield from _parts_of(job.reading, [(where, found)])
    except ConfigError:
        raise
    except Exception as error:  # pyarrow and the codecs share no base class
        raise ConfigError(f"{file} cannot be read: {reason(error)}") from error


def _parts_of(reading: Reading, found: Iterable[tuple[str, Record | RecordError]]) -> Iterator[Part]:
    """The parts of records."""
    for where, record in found:
        if isinstance(record, RecordError):
            yield where, record
            continue
        try:
            for part in reading.split(where, record):
                yield where, part
        except RecordError as error:
            yield where, error


def _groups(parts: Iterable[tuple[tuple[int, int], Part]]) -> Iterator[tuple[tuple[int, int], list[Part]]]:
    """Parts in groups of about GROUP characters, each with the progress after it."""
    group: list[Part] = []
    total, behind = 0, (0, 0)
    for behind, part in parts:
        group.append(part)
        total += _size(part[1])
        if total >= GROUP:
            yield behind, group
            group, total = [], 0
    if group:
        yield behind, group


def _size(value: Any) -> int:
    """Roughly how much there is to tokenise: characters, or tokens if there are ids."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Lines):
        return sum(map(len, value.lines))
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size, value)) if value and isinstance(value[0], str | dict | list) else len(value)
    return 1


# -- groups to arrays

Encoded = tuple[cache.Group, Counter[str], list[RecordError]]
_job: Job  # a worker's
_thread: ThreadPoolExecutor  # a worker's, of one thread


def _encoded(job: Job, group: Sequence[Part]) -> Encoded:
    """The documents of a group, counts of what was found, and errors of the records that cannot be used."""
    reading = job.reading
    parsed: list[Any] = []
    errors: list[RecordError] = []
    reading.counts.clear()
    for where, part in _parsed(reading, group):
        try:
            if isinstance(part, RecordError):
                raise part
            parsed += reading.parse(where, part)
        except RecordError as error:
            errors.append(error)
    return cache.grouped(reading.encode(parsed), job.size), Counter(reading.counts), errors


def _parsed(reading: Reading, group: Iterable[Part]) -> Iterator[Part]:
    """The parts of a group, with each block of lines replaced by its parts."""
    for where, part in group:
        if isinstance(part, Lines):
            yield from _parts_of(reading, part.records(reading.fields))
        else:
            yield where, part


def _encode(
    job: Job, groups: Iterable[tuple[tuple[int, int], list[Part]]]
) -> Generator[tuple[tuple[int, int], Encoded]]:
    """Encode groups in order: with a process per core, or in this process if there is little to do.

    The processes are forked, as in torch's DataLoader, so that they share the tokenizer's memory.
    """
    workers = min(len(os.sched_getaffinity(0)), sum(file.stat().st_size for file, _ in job.sources) // GROUP)
    if workers < 2:
        yield from ((behind, _encoded(job, group)) for behind, group in groups)
        return
    with _without_threads():
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job, os.getpid()))
        try:
            yield from in_order(pool, _encode_in_thread, groups, AHEAD * workers)
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a tokenising process was killed, perhaps for lack of memory; run the same command again to continue"
            ) from error


def in_order(pool: Executor, make: Callable[[T], Made], inputs: Iterable[T], ahead: int) -> Generator[Made]:
    """make(x) of each input, in order; a pool makes the next `ahead` ones in advance. At the end, the pool ends too."""
    try:
        waiting: deque[Future[Made]] = deque()
        for x in inputs:
            waiting.append(pool.submit(make, x))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_threads() -> Iterator[None]:
    """Disable the tokenizers' own threads, since there is a process per core."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_worker(job: Job, parent: int) -> None:
    """Initialise a worker, which ends with its parent and leaves signals to it."""
    global _job, _thread
    _job, _thread = job, ThreadPoolExecutor(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()


def _exit_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode_in_thread(group: tuple[tuple[int, int], list[Part]]) -> tuple[tuple[int, int], Encoded]:
    """Encode a group in a thread, which has its own malloc arena.

    In the arena inherited from the parent process, the tokenizer takes 18 percent longer.
    """
    behind, parts = group
    return behind, _thread.submit(_encoded, _job, parts).result()
