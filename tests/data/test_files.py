"""A search finds what glob finds, each file once, ends whatever links there are, and reports what it leaves out."""

import glob
import os
from pathlib import Path

import pytest

from ringflash.data import files
from ringflash.data.files import search, suffixes
from ringflash.errors import ConfigError
from tests.data.cases import config, stored, texts_of, write_texts

NAMES = ["b", "a/z", "a/c [1]", "a/.h/x", "a/d/e/f", "B", "10", "9", ".hidden", "a/d/b"]
PATTERNS = [
    "*", "**", "**/*", "*.txt", "**/*.txt", "a/*.txt", "a/**", "a/**/*.txt", "**/d/*.txt", "**/d/**/*.txt", "*/*/*",
    ".*", "**/.h/*", "a/.h/x.txt", "**/[!a-z]*", "**/**/b.txt", "./b.txt", "a//z.txt", "[ab]*", "**/a/**", "none/*",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        file = tmp_path / "[t]ext*" / f"{name}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "[t]ext*"


def relative(found, folder):
    return [str(file.relative_to(folder)) for file in found]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_glob_matches_in_the_order_of_names(folder, pattern):
    expected = {folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)}
    assert search(folder, [pattern]).files == sorted(file for file in expected if file.is_file())


def test_patterns_together_match_what_each_matches(folder):
    alone = {file for pattern in PATTERNS for file in search(folder, [pattern]).files}
    assert set(search(folder, PATTERNS).files) == alone


def test_a_file_that_links_reach_twice_is_found_once_and_a_linked_folder_is_searched(tmp_path):
    write_texts(tmp_path / "elsewhere", ["far"])
    folder = write_texts(tmp_path / "text", ["near"])
    (folder / "alias.txt").symlink_to(folder / "000.txt")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "linked again").symlink_to(tmp_path / "elsewhere")
    for pattern in ("**/*.txt", "**/*", "*/*.txt"):
        assert relative(search(folder, [pattern]).files, folder)[-1] == "linked/000.txt"
    assert relative(search(folder, ["**/*"]).files, folder) == ["000.txt", "linked/000.txt"]
    assert relative(search(folder, ["linked again/*"]).files, folder) == ["linked again/000.txt"]


@pytest.mark.parametrize("pattern", ["**/*.txt", "**/*/*/*.txt"])
def test_links_that_form_loops_or_many_paths_are_searched_in_a_moment(tmp_path, pattern):
    """Twelve folders that each link to all of them have paths without end."""
    for i in range(12):
        write_texts(tmp_path / str(i), ["text"])
        for j in range(12):
            (tmp_path / str(i) / f"to {j}").symlink_to(tmp_path / str(j))
    found = search(tmp_path, [pattern]).files
    assert {os.path.realpath(file) for file in found} == {str(tmp_path / str(i) / "000.txt") for i in range(12)}
    assert len(found) == 12


def test_files_that_no_pattern_matches_are_counted_by_suffix(tmp_path, capsys):
    folder = write_texts(tmp_path / "text", ["a"])
    for name in ("b.ndjson", "c.JSONL", "C.TXT", "d.csv.gz", "notes", "e.ndjson", ".hidden"):
        (folder / name).write_text("")
    settings = config(tmp_path, folder, files=["**/*.txt"])
    stored(settings)
    counts = "2 .ndjson, 1 .TXT, 1 .JSONL, 1 .gz, 1 without a suffix"
    assert capsys.readouterr().out == f"data.path={folder} has files that data.files leaves out: {counts}\n"
    stored(settings)
    assert capsys.readouterr().out == ""  # from the cache
    with pytest.raises(ConfigError, match=r"data\.files=\['\*\.md'\] match no file; the folder has 2 \.ndjson, 1 \.t"):
        stored(config(tmp_path, folder, files=["*.md"]))


def test_many_suffixes_are_counted_together():
    names = [Path(f"a.{suffix}") for suffix in "abcdefghijkl"] + [Path("b.z")] * 2
    assert suffixes(names) == "2 .z, 1 .a, 1 .b, 1 .c, 1 .d, 1 .e, 1 .f, 1 .g, 5 with others"


def test_names_that_are_not_utf_8_are_read_and_printed(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"t\xe9.jsonl", b"left out.\xe9"):
        (folder / os.fsdecode(name)).write_text('{"text": "read"}' if name.endswith(b"jsonl") else "read")
    assert texts_of(config(tmp_path, folder, files=["*.txt", "*.jsonl"])) == ["read"] * 2
    assert capsys.readouterr().out == f"data.path={folder} has files that data.files leaves out: 1 .\\udce9\n"


def test_a_link_to_a_file_that_is_gone_is_refused(tmp_path):
    folder = write_texts(tmp_path / "text", ["a"])
    (folder / "b.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(ConfigError, match=r"text/b\.txt is a link to .*/gone\.txt, which does not exist"):
        search(folder, ["**/*"])
    assert relative(search(folder, ["0*"]).files, folder) == ["000.txt"]


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    write_texts(tmp_path / "text" / "closed")
    folder = write_texts(tmp_path / "text", ["a"])
    monkeypatch.setattr(files.os, "access", lambda path, mode: path.name != "closed")  # root may list any
    with pytest.raises(ConfigError, match=r"text/closed cannot be listed: permission denied"):
        search(folder, ["**/*.txt"])
    assert relative(search(folder, ["*.txt"]).files, folder) == ["000.txt"]
