"""Several sources are one stream with the shares that were asked for, on any number of ranks, and resumable."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from ringflash.data import batch, load_corpora, stream
from ringflash.data.config import DataConfig, SourceConfig, WeightedSource
from ringflash.data.mixture import locate
from ringflash.errors import ConfigError
from ringflash.training.evaluation import Evaluation, EvaluationConfig
from tests.data.cases import write_jsonl, write_parquet, write_texts


@pytest.fixture
def config(tmp_path):
    """The settings of three sources in three formats; of each text there is one letter."""
    write_texts(tmp_path / "a", ["a" * 31] * 12)
    write_jsonl(tmp_path / "b.jsonl", ["b" * 31] * 24, field="body")
    write_parquet(tmp_path / "c.parquet", ["c" * 31] * 4, field="content")

    def made(weights=(None, None, None), **settings):
        sources = {
            "a": WeightedSource(path=str(tmp_path / "a"), weight=weights[0]),
            "b": WeightedSource(path=str(tmp_path / "b.jsonl"), field="body", weight=weights[1]),
            "c": WeightedSource(path=str(tmp_path / "c.parquet"), field="content", packing="whole", weight=weights[2]),
        }
        fixed = {"sources": sources, "cache": str(tmp_path / "cache"), "sequence_length": 32, "held_out": 0.0}
        return DataConfig(**fixed | settings)

    return made


def letters(corpus, numbers):
    """The source of each sequence, by its letter: ByT5's ids are bytes + 3."""
    return "".join(chr(corpus.packed(0, i, 32).tokens[0] - 3) for i in numbers)


@pytest.mark.parametrize("weights", [(None,) * 3, (2, 1, 1)], ids=["by size", "weights"])
def test_a_source_is_used_once_in_its_number_of_training_sequences(config, weights):
    corpus, _ = load_corpora(config(weights))
    lengths = corpus.source_lengths(32)
    drawn = letters(corpus, range(4 * round(sum(lengths.values()))))
    assert {name: drawn.count(name) for name in "abc"} == pytest.approx(
        {name: len(drawn) / lengths[name] * size for name, size in {"a": 12, "b": 24, "c": 4}.items()}, abs=1
    )


@pytest.mark.parametrize("shares", [(2, 1, 1), (0.7, 0.2, 0.1), (5, 3), (1,), (100, 1, 1e-3), (3.3,) * 7], ids=str)
def test_each_stretch_has_the_shares_and_each_source_its_sequences_in_order(shares):
    counts = np.zeros(len(shares), int)
    for i in range(1000):
        source, number = locate(shares, i)
        assert number == counts[source]
        counts[source] += 1
        assert abs(counts - np.array(shares) / sum(shares) * (i + 1)).max() < len(shares)
    assert locate(shares, 10**12)[1] <= 10**12


def test_weights_are_shares_of_the_sequences(config):
    training, held_out = load_corpora(config((2.0, 1.0, 1.0)))
    found = letters(training, range(40))
    assert held_out is None
    assert [found.count(letter) for letter in "abc"] == [20, 10, 10]
    assert training.description(32)[0].startswith("training   a, 50.0% of the sequences: 12 documents of 384 tokens")


def test_without_weights_an_epoch_has_each_document_once(config):
    training, _ = load_corpora(config())
    assert training.epoch_length(32) == 40
    for epoch in range(2):
        found = letters(training, range(epoch * 40, epoch * 40 + 40))
        assert [found.count(letter) for letter in "abc"] == [12, 24, 4]


def test_any_share_of_the_rows_and_any_beginning_give_the_same_stream(config):
    training, _ = load_corpora(config((2.0, 1.0, 1.0)))
    whole = [batch(training, seed=3, step=step, batch_size=4, length=32).tokens for step in range(6)]
    rows = range(2, 4)
    resumed = stream(training, seed=3, batch_size=4, length=32, rows=rows, start_step=2)
    for step, part in zip(range(2, 6), itertools.islice(resumed, 4), strict=True):
        assert torch.equal(part.tokens, whole[step][2:])
    resumed.close()


def test_each_source_has_its_own_held_out_documents_in_the_same_shares(config):
    held_out = load_corpora(config((2.0, 1.0, 1.0), held_out=0.25))[1]
    assert [len(one) for one in held_out.corpora.values()] == [3, 6, 1]
    found = letters(held_out, range(40))
    assert [found.count(letter) for letter in "abc"] == [20, 10, 10]
    assert "".join(map(held_out.source_of, range(40))) == found
    evaluation = Evaluation(EvaluationConfig(sequences=2), held_out, 32, None, None)
    assert evaluation.left_out == [source for source in "abc" if source not in found[:2]] != []
    assert len(Evaluation(EvaluationConfig(sequences=99), held_out, 32, None, None).numbers) == 99
    p = np.array([0.5, 0.25, 0.25]) * 31 / 32  # and an end per document
    expected = -(p * np.log(p)).sum() - 1 / 32 * np.log(1 / 32)
    assert held_out.unigram_entropy() == pytest.approx(expected)


def test_sequences_of_a_single_source_are_evaluated_once(config):
    held_out = load_corpora(config((2.0, 1.0, 1.0), held_out=0.25))[1].corpora["b"]
    few, every, more = (Evaluation(EvaluationConfig(sequences=x), held_out, 32, None, None) for x in (2, 98, 99))
    assert few.numbers == range(2)
    assert every.numbers == range(held_out.epoch_length(32))
    assert few.identity != every.identity == more.identity


def test_a_source_to_evaluate_on_takes_no_document_from_training(config, tmp_path):
    own = SourceConfig(path=str(tmp_path / "b.jsonl"), field="body")
    training, held_out = load_corpora(config(evaluation=own))
    assert [len(one) for one in training.corpora.values()] == [12, 24, 4]
    assert (len(held_out), held_out.split) == (24, "evaluation")
    one = DataConfig(
        path=str(tmp_path / "a"), evaluation=own, held_out=0, cache=str(tmp_path / "cache"), sequence_length=32
    )
    assert [len(corpus) for corpus in load_corpora(one)] == [12, 24]


def test_other_weights_and_other_packing_have_another_digest(config):
    first, *others = (config(weights) for weights in ((1.0, 1.0, 1.0), (1.0, 2.0, 1.0), (None, None, None)))
    again = config((1.0, 1.0, 1.0), packing="whole")
    assert load_corpora(first)[0].digest == load_corpora(first)[0].digest
    assert load_corpora(first)[0].digest not in {load_corpora(other)[0].digest for other in (*others, again)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": {}}, "data.path is not set; add data.path=... to the command line, or data.sources"),
        ({"path": "x"}, "data.path=x and data.sources exclude each other"),
        ({"sources": {"a": WeightedSource()}}, "data.sources.a has no path"),
        ({"sources": {"a": WeightedSource(path="x", weight=0)}}, "data.sources.a.weight=0 must be more than 0"),
        (
            {"sources": {"a": WeightedSource(path="x", weight=1), "b": WeightedSource(path="x")}},
            "data.sources.b has no weight, and others have",
        ),
        ({"sources": {"a": WeightedSource(path="x", format="xml")}}, "data.sources.a: data.format=xml must be"),
        ({"sources": {"a": WeightedSource(path="x", chat=True)}}, "data.sources.a: data.packing=cut would cut"),
        ({"sources": {"a": WeightedSource(path="/none")}}, "data.sources.a: data.path=/none does not exist"),
        ({"evaluation": SourceConfig(path="x"), "held_out": 0.1}, "data.evaluation.path=x and data.held_out=0.1 exclu"),
        ({"evaluation": SourceConfig(field="x")}, "data.evaluation has no path"),
        ({"evaluation": SourceConfig(path="/none")}, "data.evaluation: data.path=/none does not exist"),
        ({"sequence_length": 999}, "data.sources.a: data.path="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_source_that_cannot_be_used_is_refused_by_its_name(config, settings, message):
    with pytest.raises(ConfigError) as refused:
        load_corpora(config(**settings))
    assert str(refused.value).startswith(message)


def test_a_source_is_read_by_its_suffix_where_data_format_is_set(config):
    made = config(format="text", field="body")
    sources = {"a": made.sources["a"], "b": replace(made.sources["b"], format="suffix")}
    assert [part.format for part in replace(made, sources=sources).parts().values()] == ["text", None]
    with pytest.raises(ConfigError, match=r"data\.format=suffix must be null or one of text, jsonl"):
        config(format="suffix")
