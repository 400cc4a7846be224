"""Records of token ids are documents as they are; ids that no tokenizer gave, labels and padding are refused."""

import gzip
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ringflash.data import load_corpus
from ringflash.errors import ConfigError
from tests.data.cases import config, stored, write_jsonl

DOCUMENTS = [[3, 4, 5], [], None, [383], list(range(3, 200))]
FULL = [{"input_ids": ids, "labels": ids, "attention_mask": ids and [1] * len(ids)} for ids in DOCUMENTS]
PLAIN = [{"input_ids": ids, "text": "not read"} for ids in DOCUMENTS]


def write(folder, name, records):
    """A file of records in the format of its name."""
    file = folder / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    else:
        lines = [json.dumps(record) for record in records]
        whole = f"[{', '.join(lines)}]" if name.endswith("json") else "\n".join(lines)
        file.write_bytes(gzip.compress(whole.encode()) if name.endswith("gz") else whole.encode())
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
@pytest.mark.parametrize("records", [PLAIN, FULL], ids=["alone", "with labels and masks"])
def test_the_ids_of_each_record_are_a_document_and_nothing_is_added(tmp_path, name, records):
    tokens, offsets = stored(config(tmp_path, write(tmp_path, name, records), field="input_ids"))
    found = [tokens[begin:end].tolist() for begin, end in itertools.pairwise(offsets)]
    assert found == [ids for ids in DOCUMENTS if ids]
    assert tokens.dtype == np.uint16


def test_ids_and_the_text_of_the_same_file_have_caches_of_their_own(tmp_path):
    file = write(tmp_path, "a.jsonl", [{"input_ids": [7, 8], "text": "a"}, {"input_ids": [9], "text": "b"}])
    sizes = [len(stored(config(tmp_path, file, field=field))[0]) for field in ("input_ids", "text", "input_ids")]
    assert sizes == [3, 4, 3]


REFUSED = {
    "too high": (
        {"input_ids": [3, 384]},
        "1: data.field=input_ids holds 384, and data.tokenizer has 384 tokens",
    ),
    "negative": ({"input_ids": [-100]}, "holds -100, and data.tokenizer has 384 tokens"),
    "a text": ({"input_ids": "3 4"}, "record 1: data.field=input_ids holds '3 4', not a list of token ids"),
    "fractions": ({"input_ids": [3.5]}, "holds [3.5], not a list of token ids"),
    "booleans": ({"input_ids": [True]}, "holds [True], not a list of token ids"),
    "rows": ({"input_ids": [[3]]}, "holds [[3]], not a list of token ids"),
    "labels": (
        {"input_ids": [3, 4], "labels": [-100, 4]},
        "1 has labels other than its input_ids, which are no",
    ),
    "padding": ({"input_ids": [3, 0], "attention_mask": [1, 0]}, "has an attention_mask that hides tokens: remove"),
    "no ids": ({"text": "a"}, "record 1 has no field data.field=input_ids; it has text"),
}


@pytest.mark.parametrize(("record", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_records_that_would_not_train_as_they_are_written_are_refused_with_their_place(tmp_path, name, record, message):
    if name == "a.parquet":
        message = message.replace("record 1 has no", "a.parquet has no").replace("record 1", "row 1")
    with pytest.raises(ConfigError) as refused:
        load_corpus(config(tmp_path, write(tmp_path, name, [record]), field="input_ids"))
    assert message in str(refused.value)


def test_an_integer_that_no_tensor_holds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds \[1180591620717411303424\], not a list of token ids"):
        stored(config(tmp_path, write(tmp_path, "a.jsonl", [{"input_ids": [2**70]}]), field="input_ids"))


def test_tables_of_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("input_ids\n3 4\n")
    with pytest.raises(ConfigError, match=r"data\.field=input_ids is a list per record, but .*a\.csv is read as csv"):
        stored(config(tmp_path, tmp_path / "a.csv", field="input_ids"))
    (tmp_path / "a.txt").write_text("3 4")
    with pytest.raises(ConfigError, match=r"data\.field=input_ids names a field, but .* is read as text"):
        stored(config(tmp_path, tmp_path / "a.txt", field="input_ids"))
    with pytest.raises(ConfigError, match=r"has no field data\.field=input_ids"):
        stored(config(tmp_path, write_jsonl(tmp_path / "b.jsonl"), field="input_ids"))
