"""A stream of files is the sequences of each file in turn, resumable anywhere, with few files' tokens on the disk."""

import errno
import fcntl
import itertools
import json
import os
import threading

import pytest
import torch

from ringflash.data import batch, load_corpora, load_corpus
from ringflash.data.config import DataConfig, SourceConfig
from ringflash.data.packing import epoch_generator, pack, sequences_per_epoch
from ringflash.data.streamed import StreamedCorpus
from ringflash.errors import ConfigError
from tests.data.cases import write_jsonl, write_parquet

LENGTH = 16
COUNTS = [3, 1, 0, 5, 2]  # sequences of each file


@pytest.fixture
def config(tmp_path):
    """Files of these numbers of sequences, in two formats."""
    (tmp_path / "text").mkdir()
    for i, count in enumerate(COUNTS):
        texts = [chr(97 + i) * 7] * (2 * count + 1)
        write = write_parquet if i % 2 else write_jsonl
        write(tmp_path / "text" / f"{i}.{'parquet' if i % 2 else 'jsonl'}", texts)

    def made(**settings):
        fixed = {"path": str(tmp_path / "text"), "cache": str(tmp_path / "cache"), "sequence_length": LENGTH}
        return DataConfig(**{"stream": True, "held_out": 0.0} | fixed | settings)

    return made


def expected(config, tmp_path, seed, epochs):
    """The stream, from whole corpora."""
    parts = [
        DataConfig(path=str(file), cache=str(tmp_path / "whole"), held_out=0, sequence_length=LENGTH)
        for file in sorted((tmp_path / "text").iterdir())
    ]
    corpora = [load_corpus(part)[0] for part in parts]
    assert [corpus.total // LENGTH for corpus in corpora] == COUNTS
    return [
        pack(corpora[i], seed, epoch * COUNTS[i] + number, LENGTH).tokens
        for epoch in range(epochs)
        for i in epoch_generator(seed, epoch).permutation(len(COUNTS))
        for number in range(COUNTS[i])
    ]


def tokenised_files(monkeypatch):
    """The numbers of the files that are tokenised or read from the cache, as they are."""
    found, real = [], StreamedCorpus._tokenised
    monkeypatch.setattr(StreamedCorpus, "_tokenised", lambda self, file: found.append(file) or real(self, file))
    return found


def settled():
    """Wait for the threads that tokenise ahead."""
    for thread in threading.enumerate():
        if thread.name == "next file":
            thread.join()


def test_the_stream_is_the_sequences_of_each_file_in_an_order_drawn_per_epoch(config, tmp_path):
    exact = expected(config(), tmp_path, seed=3, epochs=3)
    stream, _ = load_corpora(config())
    for i, tokens in enumerate(exact):
        assert torch.equal(stream.packed(3, i, LENGTH).tokens, tokens), i
        settled()
        assert len(list((tmp_path / "cache").glob("*/corpus.json"))) <= 4
    assert torch.equal(stream.packed(3, 1, LENGTH).tokens, exact[1])  # whose tokens are deleted
    assert stream.description(LENGTH)[0].startswith("training   5 files of ")


def test_rows_of_two_replicas_are_those_of_one(config, tmp_path):
    exact = expected(config(), tmp_path, seed=0, epochs=2)
    halves = [StreamedCorpus(config()), StreamedCorpus(config())]
    for step in range(5):
        for half, rows in zip(halves, (range(2), range(2, 4)), strict=True):
            found = batch(half, seed=0, step=step, batch_size=4, length=LENGTH, rows=rows).tokens
            assert torch.equal(found, torch.stack(exact[4 * step : 4 * step + 4][rows.start : rows.stop]))
    settled()


@pytest.mark.parametrize("lost", [False, True], ids=["", "ledger lost"])
def test_a_resumed_stream_continues_exactly_and_tokenises_no_file_before_its_place(config, tmp_path, monkeypatch, lost):
    exact = expected(config(), tmp_path, seed=1, epochs=2)
    first = StreamedCorpus(config())
    for i in range(9):
        first.packed(1, i, LENGTH)
    settled()
    if lost:
        (first._folder / "ledger.json").unlink()
    found = tokenised_files(monkeypatch)
    resumed = StreamedCorpus(config())
    assert torch.equal(resumed.packed(1, 9, LENGTH).tokens, exact[9])
    settled()
    order = epoch_generator(1, 0).permutation(len(COUNTS)).tolist()
    ends = list(itertools.accumulate(COUNTS[i] for i in order))
    place = next(i for i, end in enumerate(ends) if end > 9)
    assert {*found} <= {*order[0 if lost else place : place + 2]} | {epoch_generator(1, 1).permutation(5).tolist()[0]}


def test_a_stream_that_ends_at_a_malformed_record_is_continued_without_it(config, tmp_path):
    exact = expected(config(), tmp_path, seed=1, epochs=1)
    with (tmp_path / "text" / "4.jsonl").open("a") as file:
        file.write('{"text": 5}\n')
    first, found = StreamedCorpus(config()), []
    with pytest.raises(ConfigError, match=r"4\.jsonl line 6: .*; data\.malformed=skip leaves such records out"):
        found.extend(first.packed(1, i, LENGTH) for i in range(len(exact)))
    settled()
    resumed = StreamedCorpus(config(malformed="skip"))
    assert found
    assert resumed.digest == first.digest
    assert torch.equal(resumed.packed(1, len(found), LENGTH).tokens, exact[len(found)])
    settled()


def test_lock_files_are_open_for_writing_as_nfs_needs(config, monkeypatch):
    def lock(descriptor, operation):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "not open for writing")

    corpus = StreamedCorpus(config())
    monkeypatch.setattr(fcntl, "flock", lock)
    with corpus._locked("0") as held:
        assert held


def test_a_source_to_evaluate_on_is_tokenised_whole(config, tmp_path):
    own = SourceConfig(path=str(tmp_path / "text" / "3.parquet"))
    training, held_out = load_corpora(config(evaluation=own))
    assert isinstance(training, StreamedCorpus)
    assert (len(held_out), sequences_per_epoch(held_out, LENGTH)) == (11, 5)


def test_a_file_that_cannot_be_used_is_refused_with_its_line_when_it_is_reached(config, tmp_path):
    (tmp_path / "text" / "0.jsonl").write_text('{"text": 1}')
    stream = StreamedCorpus(config())
    with pytest.raises(ConfigError, match=r"0\.jsonl line 1: data\.field=text holds int, not text"):
        batch(stream, seed=0, step=0, batch_size=20, length=LENGTH)
    settled()


def test_a_file_whose_answers_are_all_cut_off_is_reported_and_has_no_sequences(tmp_path, capsys):
    for name, trained in (("a", 3), ("b", 20)):
        record = {"input_ids": [5] * 30, "labels": [7 if i == trained else -100 for i in range(30)]}
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    asked = {"path": str(tmp_path), "cache": str(tmp_path / "cache"), "sequence_length": 16, "stream": True}
    packing = {"field": "input_ids", "packing": "truncate", "held_out": 0.0}
    stream = StreamedCorpus(DataConfig(**asked, **packing))
    assert {(stream.packed(0, i, 16).labels == 7).sum().item() for i in range(6)} == {1}
    settled()
    assert capsys.readouterr().out == f"{tmp_path}/b.jsonl: the first 16 tokens of 2 documents hold no label\n"


def test_a_file_that_has_changed_is_refused(config, tmp_path):
    stream = StreamedCorpus(config())
    for i in range(11):
        stream.packed(0, i, LENGTH)
    settled()
    file = tmp_path / "text" / "0.jsonl"
    file.write_text(file.read_text().replace("aaaaaaa", "a\\u0061"))  # of the same size
    with pytest.raises(ConfigError, match=r"0\.jsonl has \d sequences, and had 3 when it was read before"):
        StreamedCorpus(config())._tokenised(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": 0.1}, "data.stream=true has no documents to hold out, and data.held_out=0.1"),
        ({"sequence_length": 999}, "none of its 5 files fills a sequence of data.sequence_length=999 tokens"),
    ],
    ids=["held out", "too long"],
)
def test_what_cannot_be_streamed_is_refused(config, settings, message):
    with pytest.raises(ConfigError, match=message):
        StreamedCorpus(config(**settings)).packed(0, 0, settings["sequence_length"])


def test_epochs_are_refused(config):
    with pytest.raises(ConfigError, match=r"optim\.epochs needs a number of sequences, which data\.stream=true"):
        StreamedCorpus(config()).epoch_length(LENGTH)
