"""Records of token ids are documents as they are; ids that no tokenizer gave, labels and padding are refused."""

import gzip
import itertools
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ringflash.data import load_corpus, tokenised
from ringflash.errors import ConfigError
from tests.data.cases import config, stored, write_jsonl

DOCUMENTS = [[3, 4, 5], [], [383], list(range(3, 200))]
FULL = [{"input_ids": ids, "labels": ids, "attention_mask": ids and [1] * len(ids)} for ids in DOCUMENTS]
PLAIN = [{"input_ids": ids, "text": "not read"} for ids in DOCUMENTS]


def write(folder, name, records):
    """A file of records in the format of its name."""
    file = folder / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif name.endswith("arrow"):
        table = pyarrow.Table.from_pylist(records)
        with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    else:
        lines = [json.dumps(record) for record in records]
        whole = f"[{', '.join(lines)}]" if name.endswith("json") else "\n".join(lines)
        file.write_bytes(gzip.compress(whole.encode()) if name.endswith("gz") else whole.encode())
    return file


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet"])
@pytest.mark.parametrize("records", [PLAIN, FULL], ids=["alone", "with labels and masks"])
def test_the_ids_of_each_record_are_a_document_and_nothing_is_added(tmp_path, capsys, name, records):
    tokens, offsets = stored(config(tmp_path, write(tmp_path, name, records), field="input_ids"))
    found = [tokens[begin:end].tolist() for begin, end in itertools.pairwise(offsets)]
    assert found == [ids for ids in DOCUMENTS if ids]
    assert "1 empty documents are left out" in capsys.readouterr().out
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
    "null": ({"input_ids": None}, "record 1: data.field=input_ids holds None, not a list of token ids"),
    "fractions": ({"input_ids": [3.5]}, "holds [3.5], not a list of token ids"),
    "booleans": ({"input_ids": [True]}, "holds [True], not a list of token ids"),
    "rows": ({"input_ids": [[3]]}, "holds [[3]], not a list of token ids"),
    "labels too high": ({"input_ids": [3, 4], "labels": [-100, 384]}, "labels holds 384, and data.tokenizer has 384"),
    "labels below": ({"input_ids": [3, 4], "labels": [-1, 4]}, "labels holds -1, and data.tokenizer has 384 tokens"),
    "fewer labels": ({"input_ids": [3, 4], "labels": [4]}, "record 1: labels holds 1 labels, for 2 input_ids"),
    "labels that are text": ({"input_ids": [3, 4], "labels": "3"}, "labels holds '3', not a list of token ids"),
    "fewer positions": ({"input_ids": [3, 4], "position_ids": [0]}, "position_ids must count each document's tokens"),
    "positions from 1": ({"input_ids": [3, 4], "position_ids": [1, 2]}, "must count each document's tokens from 0, 2"),
    "positions with a gap": ({"input_ids": [3, 4, 5], "position_ids": [0, 1, 3]}, "count each document's tokens from"),
    "boundaries past the end": (
        {"input_ids": [3, 4], "cu_seqlens": [0, 3]},
        "must rise from 0 to the 2 input_ids, got",
    ),
    "boundaries that fall": ({"input_ids": [3, 4, 5], "cu_seqlens": [0, 2, 1, 3]}, "must rise from 0 to the 3 input"),
    "both, differently": (
        {"input_ids": [3, 4], "position_ids": [0, 1], "cu_seqlens": [0, 1, 2]},
        "position_ids and cu_seqlens divide its input_ids differently",
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


def test_labels_of_their_own_are_kept_and_the_other_documents_predict_their_tokens(tmp_path):
    records = [
        {"input_ids": [3, 4]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
        {"input_ids": [8, 9], "labels": None},
        {"input_ids": [10, 11], "labels": [383, 0]},
    ]
    found = tokenised(config(tmp_path, write(tmp_path, "a.jsonl", records), field="input_ids"))
    assert found.labels.dtype == np.int32
    assert found.labels.tolist() == [3, 4, -100, -100, 7, 8, 9, 383, 0]
    assert found.tokens.tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]


def test_labels_that_predict_nothing_are_refused(tmp_path):
    records = [{"input_ids": [3, 4, 5], "labels": [-100] * 3}] * 3
    with pytest.raises(ConfigError, match=r"a.jsonl has labels that are all -100: there is nothing to learn"):
        load_corpus(config(tmp_path, write(tmp_path, "a.jsonl", records), field="input_ids"))


def test_without_labels_of_their_own_no_labels_are_stored(tmp_path):
    settings = config(tmp_path, write(tmp_path, "a.jsonl", FULL), field="input_ids")
    assert tokenised(settings).labels is None
    assert list(tmp_path.glob("cache/*/labels.npy")) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow"])
@pytest.mark.parametrize(
    "division",
    [{"position_ids": [0, 1, 0, 0, 1, 2]}, {"cu_seqlens": [0, 2, 2, 3, 6]},
     {"position_ids": [0, 1, 0, 0, 1, 2], "cu_seqlens": [0, 2, 3, 6]}],
    ids=["position_ids", "cu_seqlens", "both"],
)  # fmt: skip
def test_packed_records_are_the_documents_that_their_positions_or_boundaries_tell(tmp_path, name, division):
    record = {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [3, -100, 5, -100, 7, 8], **division}
    found = tokenised(config(tmp_path, write(tmp_path, name, [record]), field="input_ids"))
    assert found.offsets.tolist() == [0, 2, 3, 6]
    assert found.labels.tolist() == record["labels"]


def test_damaged_labels_are_found_and_made_again(tmp_path, capsys):
    records = [{"input_ids": [3, 4], "labels": [-100, 4]}] * 5
    settings = config(tmp_path, write(tmp_path, "a.jsonl", records), field="input_ids")
    sound = tokenised(settings).labels.tolist()
    [file] = tmp_path.glob("cache/*/labels.npy")
    file.write_bytes(file.read_bytes()[:-4] + b"\x07\0\0\0")
    assert tokenised(settings).labels.tolist() == sound
    assert "labels.npy has other contents than were written" in capsys.readouterr().out


def test_other_labels_have_another_digest(tmp_path):
    digests = []
    for labels in ([3, 4], [-100, 4], [-100, 3]):
        records = [{"input_ids": [3, 4], "labels": labels}] * 3
        settings = config(tmp_path, write(tmp_path, "a.jsonl", records), field="input_ids")
        digests.append(load_corpus(settings)[0].digest)
    assert len({*digests}) == 3


def test_an_integer_that_no_tensor_holds_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds \[1180591620717411303424\], not a list of token ids"):
        stored(config(tmp_path, write(tmp_path, "a.jsonl", [{"input_ids": [2**70]}]), field="input_ids"))


def test_tables_of_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("input_ids\n3 4\n")
    with pytest.raises(ConfigError, match=r"data\.field=input_ids is a list per record, but .*a\.csv is read as csv"):
        stored(config(tmp_path, tmp_path / "a.csv", field="input_ids"))
    (tmp_path / "a.txt").write_text("3 4")
    with pytest.raises(ConfigError, match=r"data\.field=input_ids needs records, but .* is read as text"):
        stored(config(tmp_path, tmp_path / "a.txt", field="input_ids"))
    with pytest.raises(ConfigError, match=r"has no field data\.field=input_ids"):
        stored(config(tmp_path, write_jsonl(tmp_path / "b.jsonl"), field="input_ids"))
