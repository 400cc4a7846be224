"""What the tests of the data share: texts on disk in each format, and corpora in memory."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ringflash.data import DataConfig, TokenCorpus, tokenised

TEXTS = ["one", "zwei\nzeilen\n", "2020-01-01", "naïve café 😀", "last </s> one", "x" * 300]

lengths = st.lists(st.integers(1, 20), min_size=1, max_size=12)


def corpus(lengths: list[int], chosen: list[int] | None = None) -> TokenCorpus:
    """Documents of the given lengths. All tokens differ, so each shows where it is from."""
    return TokenCorpus(
        tokens=np.arange(sum(lengths), dtype=np.uint16),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        selection=np.arange(len(lengths)) if chosen is None else np.array(chosen),
        vocabulary=sum(lengths),
    )


def write_texts(folder: Path, texts: list[str] = TEXTS) -> Path:
    """A folder with a text file for each text."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def write_jsonl(file: Path, texts: list[str | None] = TEXTS, field: str = "text") -> Path:
    """A JSON Lines file with one text per line, and a field that only the last line has."""
    rows = [{field: text} for text in texts]
    rows[-1]["late"] = 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_parquet(file: Path, texts: list[str | None] = TEXTS, field: str = "text") -> Path:
    """A parquet file with one text per row, in row groups of two."""
    table = pyarrow.table({field: texts, "number": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, file, row_group_size=2)
    return file


def config(tmp_path: Path, path: Path | str, **settings) -> DataConfig:
    """A DataConfig whose cache is in the test's own folder."""
    return DataConfig(path=str(path), **{"cache": str(tmp_path / "cache"), **settings})


def documents(corpora: tuple[TokenCorpus, ...]) -> list[list[int]]:
    """The documents of all splits, sorted."""
    return sorted(split.document(i).tolist() for split in corpora for i in range(len(split)))


def write_tokenizer(folder, words=("one", "two"), eos="<eos>", bos=None):
    """A folder with a word-level Hugging Face tokenizer, which adds `bos` itself if it has one."""
    vocabulary = {word: i for i, word in enumerate(filter(None, ("<unk>", eos, bos, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A {eos}", special_tokens=[(bos, vocabulary[bos]), (eos, vocabulary[eos])]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos).save_pretrained(folder)
    return folder


def texts_of(settings: DataConfig) -> list[str]:
    """The documents of a byte-tokenised corpus as texts, in order."""
    tokens, offsets = stored(settings)
    ends = itertools.pairwise(offsets)
    return [bytes((tokens[begin : end - 1] - 3).astype("uint8")).decode() for begin, end in ends]


def stored(settings: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets in the cache."""
    return tokenised(settings)[:2]
