"""The prose linter finds what it names, in every kind of file, and nothing in code."""

import pytest

from tests import prose

WORD = "an" + "ew"  # one that it names


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".py", f'"""Steps begin {WORD}."""\n'),
        (".py", f"x = 1  # begin {WORD}\n"),
        (".py", f'raise ValueError(f"step {{x}} begins {WORD}, as asked")\n'),
        (".md", f"# Steps\n\nThey begin {WORD}.\n"),
        (".md", f"- a list\n- that begins {WORD}\n"),
        (".yaml", f"# begin {WORD}\nkey: 1\n"),
        (".sh", f"set -e\nrun  # begin {WORD}\n"),
    ],
)
def test_a_word_is_found_in_the_prose_of_every_kind_of_file(suffix, text, tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    path = tmp_path / f"file{suffix}"
    path.write_text(text)
    assert [found.phrase for found in prose.found_in(path)] == [WORD]


@pytest.mark.parametrize(
    ("suffix", "text"), [(".py", f"{WORD} = 1\n"), (".md", f"```\n{WORD}\n```\n"), (".yaml", f"{WORD}: 1\n")]
)
def test_code_is_not_prose(suffix, text, tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    path = tmp_path / f"file{suffix}"
    path.write_text(text)
    assert prose.found_in(path) == []


def test_a_phrase_over_a_lines_end_is_found_on_its_first_line(tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text("# what stands in\n# the " + "place of another\n")
    assert [(found.line, found.phrase) for found in prose.found_in(path)] == [(1, "in the " + "place of")]


@pytest.mark.parametrize(("words", "found"), [(prose.LONGEST_SENTENCE, 0), (prose.LONGEST_SENTENCE + 1, 1)])
def test_a_long_sentence_of_a_document_is_found(words, found, tmp_path, monkeypatch):
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    path = tmp_path / "file.md"
    path.write_text("Short.\n\n" + "word\n" * (words - 1) + "end.\n")
    assert len(prose.found_in(path)) == found
