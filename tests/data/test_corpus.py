"""A split is fixed by seed, fraction and number of documents, loses none of them, and counts its statistics right."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringflash.data import TokenCorpus, corpus, load_corpus
from tests.data.cases import config, documents, write_texts


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(2, 0.05, 1), (3, 0.99, 2), (30, 0.1, 3), (5, 0.0, 0), (1, 0.0, 0)]
)
def test_the_split_takes_the_fraction_and_keeps_at_least_one_on_each_side(tmp_path, count, fraction, held_out):
    path = write_texts(tmp_path / "text", [f"document {i}" for i in range(count)])
    train, evaluation = load_corpus(config(tmp_path, path, held_out=fraction))
    assert (len(train), len(evaluation)) == (count - held_out, held_out)
    assert len(documents((train, evaluation))) == len({*map(tuple, documents((train, evaluation)))}) == count


def test_the_seed_decides_the_split(tmp_path):
    path = write_texts(tmp_path / "text", [f"document {i}" for i in range(30)])
    chosen = [load_corpus(config(tmp_path, path, seed=seed))[1].selection.tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_the_vocabulary_is_what_occurs_in_either_split(tmp_path):
    train, held_out = load_corpus(config(tmp_path, write_texts(tmp_path / "text", ["ab", "z"])))
    assert train.vocabulary == held_out.vocabulary == ord("z") + 3 + 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=9), min_size=1, max_size=9), st.data())
def test_the_unigram_entropy_is_that_of_the_tokens_to_predict(texts, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, len(texts) - 1), min_size=1)))
    whole = np.concatenate(texts)
    split = TokenCorpus(
        tokens=whole.astype(np.uint16),
        labels=data.draw(st.sampled_from([None, whole + 5])),  # some of which are no token of the corpus
        offsets=np.cumsum([0, *map(len, texts)]),
        selection=np.array(chosen),
        vocabulary=10,
    )
    tokens = [token for i in chosen for token in texts[i]]
    p = np.array([tokens.count(token) / len(tokens) for token in set(tokens)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BLOCK", data.draw(st.integers(1, 100)))
        assert split.unigram_entropy() == pytest.approx(-(p * np.log(p)).sum(), abs=1e-12)
