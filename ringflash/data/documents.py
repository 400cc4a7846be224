"""Documents: text files, JSON Lines and parquet, tokenised once into two flat arrays on disk.

    <data.cache>/<fingerprint>/tokens.npy    uint16, or uint32 for large vocabularies: all documents, end to end
                               offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
                               corpus.json   what they were made of, the vocabulary they use, and a digest of them

The fingerprint covers all that decides the tokens: files, sizes, times of change, field, tokenizer. The folder is
written aside and renamed when complete, so a killed build leaves nothing that looks finished (only `*.unfinished-*`, to
be deleted at will), and builders that run at the same time do not disturb each other: the first to finish wins. Run one
rank ahead of the others to save the work.

Nothing here uses the network: `datasets` is handed local files through its readers, not through `load_dataset`, which
reports every call to the Hub.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringflash.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2  # of the cache; to be raised when the same input gives other arrays
GROUP = 1 << 20  # characters tokenised at once: enough documents for a tokenizer's threads, bounded memory


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text to train on, and how it becomes sequences. Raises ConfigError, naming the key, for a bad value."""

    path: str
    """File or folder with the text; there is no default."""

    files: list[str] = dataclasses.field(
        default_factory=lambda: ["**/*.txt", "**/*.jsonl", "**/*.json", "**/*.parquet"]
    )
    """Glob patterns below `path`, if that is a folder. `.jsonl` and `.json` hold one JSON object a line, `.parquet` a
    table (a document a row); each other file is one UTF-8 document. A `.gz` after the suffix is read too."""

    field: str = "text"
    """Name of the JSON field or parquet column that holds the text."""

    tokenizer: str = "bytes"
    """"bytes" (ByT5: a token a byte, vocabulary 384), or a local folder with any Hugging Face tokenizer."""

    cache: str = "runs/.cache"
    """Folder for tokenised text, 2 or 4 bytes a token; entries may be deleted at any time between runs."""

    held_out: float = 0.05
    """Fraction of the documents kept apart for evaluation, at least one document; 0 keeps none, and nothing is
    evaluated."""

    seed: int = 0
    """Decides which documents are held out, and the order of training."""

    sequence_length: int = 8192
    """Tokens in a packed sequence, all ranks together."""

    def __post_init__(self) -> None:
        patterns = not isinstance(self.files, str) and len(self.files) > 0 and all(self.files)
        for key, valid, expected in (
            ("path", bool(self.path), "a file or folder"),
            ("files", patterns, "a list of one or more patterns, such as ['*.txt']"),
            ("field", bool(self.field), "the name of a field"),
            ("tokenizer", bool(self.tokenizer), "bytes or a folder"),
            ("cache", bool(self.cache), "a folder"),
            ("held_out", 0 <= self.held_out < 1, "a fraction, 0 or more and below 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("sequence_length", self.sequence_length >= 2, "2 or more tokens"),
        ):
            if not valid:
                raise ConfigError(f"data.{key}={getattr(self, key)} must be {expected}")


def python_stdlib() -> str:
    """The folder of this Python's standard library: megabytes of real text on every machine."""
    return sysconfig.get_paths()["stdlib"]


def load_tokenizer(config: DataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.tokenizer`. Raises ConfigError if its folder is missing or holds none with an end."""
    from transformers import AutoTokenizer, ByT5Tokenizer  # slow to import: only when text is at hand

    if config.tokenizer == "bytes":
        return ByT5Tokenizer()
    folder = Path(config.tokenizer).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"data.tokenizer={config.tokenizer} is neither bytes nor a folder that exists")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and tokenizers' bare Exception
        raise ConfigError(f"data.tokenizer={config.tokenizer} holds no loadable tokenizer: {_reason(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"data.tokenizer={config.tokenizer} has no eos_token, which must end each document")
    return tokenizer


def tokenised(config: DataConfig) -> Path:
    """The folder with the tokenised documents of `config`, built if it is not there yet.

    Raises ConfigError, in one line that names the key or the file, for input that cannot be found, read or used.
    """
    files, tokenizer = find_files(config), load_tokenizer(config)
    cache = Path(config.cache).expanduser()
    finished = cache / _fingerprint(files, config.field, tokenizer)
    if finished.is_dir():
        return finished
    try:
        cache.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(dir=cache, prefix=f"{finished.name}.unfinished-")
    except OSError as error:
        raise ConfigError(f"data.cache={config.cache} cannot be written: {error.strerror}") from error
    with aside as scratch:
        built = Path(scratch, "built")
        built.mkdir()
        _build(built, config, files, tokenizer)
        try:
            built.rename(finished)
        except OSError:  # another builder was first: its folder is the same
            if not finished.is_dir():
                raise
    return finished


def find_files(config: DataConfig) -> list[Path]:
    """The files of `config.path` and `config.files`, sorted. Raises ConfigError if there are none."""
    path = Path(config.path).expanduser()
    if not path.exists():
        raise ConfigError(f"data.path={config.path} does not exist")
    if path.is_file():
        return [path]
    try:
        files = {file for pattern in config.files for file in path.glob(pattern) if file.is_file()}
    except (NotImplementedError, ValueError) as error:  # how pathlib refuses a pattern
        raise ConfigError(f"data.files={list(config.files)} must be patterns below data.path: {error}") from error
    if not files:
        raise ConfigError(f"data.path={config.path} data.files={list(config.files)} match no file")
    return sorted(files)


def _build(folder: Path, config: DataConfig, files: list[Path], tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes the three files of the cache into `folder`. The tokens stream to disk; only the lengths are in memory."""
    size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    lengths, highest, digest = [0], -1, hashlib.sha256()
    with open(folder / "tokens.npy", "wb") as out:
        _write_header(out, dtype, 0)
        for texts in _groups(_documents(files, config.field, scratch=folder.parent)):
            for tokens in _encode(tokenizer, texts):
                written = tokens.astype(dtype).tobytes()
                out.write(written)
                digest.update(len(written).to_bytes(8, "little") + written)
                lengths.append(len(tokens))
                highest = max(highest, int(tokens.max()))
        if highest < 0:
            raise ConfigError(f"data.path={config.path} holds no text: all of its documents are empty")
        out.seek(0)
        _write_header(out, dtype, sum(lengths))
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    contents = {
        "path": config.path,
        "files": len(files),
        "tokenizer": config.tokenizer,
        "documents": len(lengths) - 1,
        "tokens": sum(lengths),
        "vocabulary": highest + 1,
        "tokenizer_size": size,
        "digest": digest.hexdigest()[:16],
    }
    (folder / "corpus.json").write_text(json.dumps(contents, indent=1) + "\n")


def _write_header(out: Any, dtype: np.dtype, count: int) -> None:
    """The .npy header of a vector. Its size does not depend on `count`: numpy leaves room for the array to grow."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(out, header)


def _documents(files: list[Path], field: str, scratch: Path) -> Iterator[str]:
    """All texts that are not empty, in file order, behind a progress bar over the files' bytes."""
    from tqdm import tqdm

    with tqdm(desc="tokenising", total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True) as bar:
        for file in files:
            left = file.stat().st_size
            try:
                for text in _read(file, field, scratch):
                    if not isinstance(text, str | None):
                        raise ConfigError(f"{file}: data.field={field} holds {type(text).__name__}, not text")
                    step = min(left, len(text or ""))
                    left -= step
                    if text:
                        yield text
                    bar.update(step)
            except ConfigError:
                raise
            except Exception as error:  # pyarrow, datasets and the codecs share no base class
                raise ConfigError(f"{file} cannot be read: {_reason(error)}") from error
            bar.update(left)


def _read(file: Path, field: str, scratch: Path) -> Iterator[Any]:
    """The texts of one file, by its suffix. `datasets` leaves its lock files in `scratch`."""
    from datasets import IterableDataset

    name, options = glob.escape(str(file)), {"cache_dir": str(scratch / "datasets")}
    suffix = Path(file.name.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        import pyarrow.parquet

        _require(field, pyarrow.parquet.read_schema(file).names, str(file))
        rows = IterableDataset.from_parquet(name, columns=[field], batch_size=64, **options)
        yield from (row[field] for row in rows)
    elif suffix in (".jsonl", ".json"):
        # Not datasets' JSON reader: it turns text that looks like dates into dates, and fails on a late new field.
        for number, row in enumerate(IterableDataset.from_text(name, **options), 1):
            if row["text"].strip():
                yield _json_text(row["text"], field, f"{file} line {number}")
    else:
        yield from (row["text"] for row in IterableDataset.from_text(name, sample_by="document", **options))


def _json_text(line: str, field: str, where: str) -> Any:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error.msg}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where} holds a {type(record).__name__}; a JSON object is expected on each line")
    _require(field, list(record), where)
    text = record[field]  # JSON can escape half a surrogate pair, which no tokenizer takes
    return text.encode("utf-8", "replace").decode() if isinstance(text, str) else text


def _require(field: str, available: list[str], where: str) -> None:
    if field not in available:
        raise ConfigError(f"{where} has no field data.field={field}; it has {', '.join(available) or 'none'}")


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups of about GROUP characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text, as the tokenizer makes them, with its eos at the end if it does not add one."""
    from transformers import ByT5Tokenizer

    eos = tokenizer.eos_token_id
    if isinstance(tokenizer, ByT5Tokenizer):  # its own loop over characters does 2 MB/s, and takes "</s>" for its eos
        ends = np.array([eos], np.uint16)
        offset = np.uint16(tokenizer.offset)
        return [np.concatenate([np.frombuffer(text.encode(), np.uint8) + offset, ends]) for text in texts]
    encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
    return [np.asarray(ids if ids and ids[-1] == eos else [*ids, eos], np.int64) for ids in encoded]


def _fingerprint(files: list[Path], field: str, tokenizer: PreTrainedTokenizerBase) -> str:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    vocabulary = sorted(tokenizer.get_vocab().items())
    made_of = [FORMAT, stats, field, type(tokenizer).__name__, rules, tokenizer.eos_token, vocabulary]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
