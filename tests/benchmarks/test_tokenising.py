"""The corpus of the tokenising benchmark has the size asked for, and both ways of tokenising it run."""

import json

from benchmarks import tokenising


def test_a_build_is_measured_beside_the_tokenizer_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenising, "TRAINED_ON", 3)
    monkeypatch.setattr(tokenising, "AT_ONCE", 10_000)
    tokenising.write_corpus(tmp_path, 50_000)
    lines = (tmp_path / "corpus.jsonl").read_text().splitlines()
    assert 50_000 <= sum(len(line) + 1 for line in lines) < 200_000
    assert all(json.loads(line)["text"].strip() for line in lines)
    assert sum(map(len, tokenising._texts(tmp_path / "corpus.jsonl")), start=0) == len(lines)
    assert min(tokenising.alone(tmp_path).values()) > 0
    found = tokenising.build(tmp_path)
    assert found["tokens"] > 10_000
    assert min(found.values()) > 0
