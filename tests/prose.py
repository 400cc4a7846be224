"""Prose linter: the words and sentence lengths that this project's texts keep to.

    python -m tests.prose                          # the whole tree; exit code 1 if anything is found
    python -m tests.prose ringflash/data README.md # some files and folders

Checked are docstrings, comments and messages of Python files, comments of shell, YAML, TOML and Make files, and the
running text of Markdown. A finding is one line: file, line, what was found, what to write instead. `ALLOWED` lists
exceptions, one `file: phrase` per line.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = Path(__file__).with_name("prose_allowed.txt")
LONGEST_SENTENCE = 30  # words, in Markdown
UNITS = (
    r"(?:tokens?(?:/s)?|[GM]i?B(?:/s)?|(?:giga)?bytes?|TFLOP/s|FLOPs?|memory|seconds?|milliseconds?|microseconds|ms|"
    r"launches|messages|instructions|process(?:es)?|ranks?|entr(?:y|ies)|operations|programs|rows?|registers?|times?|lines?)"
)
# What is found, and what to write instead.
RULES = (
    (r"\bin the places? of\b", "instead of"),
    (r"\banew\b", "again"),
    (r"\bbesides\b", "also, as well, beyond"),
    (r"\b(?:goes|go|going|went) on (?:from|to|with)\b", "continues, resumes"),
    (r"\bso many\b", "the number, or as many as"),
    (r"\b(?:stands?|stood|standing) still\b", "hangs"),
    (r"\b(?:comes?|came|coming) home\b|\bhomewards?\b", "return, returned"),
    (
        rf"\b{UNITS} an? (?:GPU|rank|hop|step|layer|second|node|head|token|pair|launch|program|row|tile|SM|process)\b",
        "per",
    ),
    (r"\bfor whom\b|\bsays? no\b|\bin vain\b", "name who waits for what, plainly"),
    (r"\b(?:yardstick|lockstep)\b", "reference, per-hop imbalance"),
    (r"\b(?:dealt|deals?) (?:out|back)\b", "assigned, assigns"),
    (r"\bin its hand\b|\bof old\b", "plain words"),
    (r"\bwithout a word\b", "without a message"),
)


class Text(NamedTuple):
    """A piece of prose and the line on which it begins."""

    line: int
    words: str


class Finding(NamedTuple):
    """What was found where, and what to write instead."""

    path: str
    line: int
    phrase: str
    advice: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.phrase!r}: {self.advice}"


def found_in(path: Path) -> list[Finding]:
    """The findings of one file that no line of ALLOWED excepts."""
    name = path.resolve().relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8")
    pieces = list(_PARSERS[_kind(path)](text))
    findings = [found for piece in pieces for found in _phrases(name, piece)]
    if _kind(path) == ".md":
        findings += [found for piece in pieces for found in _long_sentences(name, piece)]
    allowed = set(ALLOWED.read_text(encoding="utf-8").splitlines()) if ALLOWED.exists() else set()
    return [found for found in findings if f"{found.path}: {found.phrase}" not in allowed]


def _phrases(name: str, piece: Text) -> Iterator[Finding]:
    for pattern, advice in RULES:
        for match in re.finditer(pattern.replace(" ", r"\s+"), piece.words, re.IGNORECASE):
            line = piece.line + piece.words.count("\n", 0, match.start())
            yield Finding(name, line, " ".join(match[0].split()), advice)


def _long_sentences(name: str, piece: Text) -> Iterator[Finding]:
    text = re.sub(r"`[^`]*`|\[([^\]]*)\]\([^)]*\)", lambda match: match[1] or "code", piece.words)
    for sentence in re.split(r"(?<=[.?!:;])\s+", text):
        if (count := len(re.findall(r"\w[\w'./+-]*", sentence))) > LONGEST_SENTENCE:
            start = " ".join(sentence.split()[:6])
            yield Finding(name, piece.line, f"{start} ...", f"{count} words: {LONGEST_SENTENCE} at most")


# -- the prose of each kind of file


def _python(text: str) -> Iterator[Text]:
    """Comments, docstrings, and other strings of at least three words."""
    yield from _joined(
        (token.start[0], token.string.lstrip("#! "))
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    )
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) >= 3:
            yield Text(node.lineno, node.value)


def _comments(text: str) -> Iterator[Text]:
    """Comments that begin with #, of shell, YAML, TOML and Make."""
    lines = (re.search(r"(?:^|\s)#+!?\s*(.*)", line) for line in text.splitlines())
    yield from _joined((number, match[1]) for number, match in enumerate(lines, start=1) if match)


def _markdown(text: str) -> Iterator[Text]:
    """Paragraphs, list items and headings; neither code nor tables."""
    text = re.sub(r"^```.*?^```$", lambda match: re.sub(r"[^\n]+", "", match[0]), text, flags=re.DOTALL | re.MULTILINE)
    paragraph: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        item = re.match(r"\s*(?:[-*]|\d+\.|#+|!\[)\s", line)
        if paragraph and (item or not line.strip() or line.lstrip().startswith("|")):
            yield Text(number - len(paragraph), "\n".join(paragraph))
            paragraph = []
        if line.strip() and not line.lstrip().startswith("|"):
            paragraph.append(line)


def _joined(lines: Iterable[tuple[int, str]]) -> Iterator[Text]:
    """Neighbouring lines as one text, so that a phrase may run over a line's end."""
    begin, words = 0, list[str]()
    for number, line in lines:
        if words and number != begin + len(words):
            yield Text(begin, "\n".join(words))
            words = []
        begin = begin if words else number
        words.append(line)
    if words:
        yield Text(begin, "\n".join(words))


_PARSERS = {".py": _python, ".md": _markdown, "": _comments}


def _kind(path: Path) -> str:
    return path.suffix if path.suffix in _PARSERS else ""


def _files(arguments: list[str]) -> list[Path]:
    """The tracked and new text files below the arguments, or of the whole tree; this one, which names all, is not."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *(arguments or ["."])]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    suffixes = {".py", ".md", ".sh", ".yaml", ".yml", ".toml"}
    paths = (ROOT / name for name in listed)
    return [p for p in paths if p != Path(__file__) and p.is_file() and (p.suffix in suffixes or p.name == "Makefile")]


def main(arguments: list[str]) -> int:
    """Print the findings, and how many there are in each file. Returns the exit code."""
    by_file = {path: found_in(path) for path in _files(arguments)}
    for findings in by_file.values():
        print("".join(f"{found}\n" for found in findings), end="")
    total = sum(map(len, by_file.values()))
    print(f"{total} findings in {sum(map(bool, by_file.values()))} of {len(by_file)} files")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
