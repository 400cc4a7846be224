"""The cache holds the tokens of its text: built once, named by every setting it depends on, never incomplete."""

import dataclasses
import filecmp
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import psutil
import pytest

from ringflash.data import build, cache, documents, formats, load_corpus, load_tokenizer, scratch, tokenised
from ringflash.data.scratch import scratch_folder
from ringflash.data.tokenizer import Encoder
from ringflash.errors import ConfigError
from tests.data.cases import TEXTS, config, write_jsonl, write_texts, write_tokenizer
from tests.data.cases import documents as documents_of


@pytest.fixture
def calls(monkeypatch):
    """The groups of texts that were tokenised."""
    groups, encode = [], Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, parts: groups.append(parts) or encode(self, parts))
    return groups


def entries(tmp_path):
    """The names in the cache's folder."""
    return sorted((tmp_path / "cache").iterdir())


def test_the_second_load_does_not_tokenise_again(tmp_path, calls):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    first = documents_of(load_corpus(settings))
    assert len(calls) == 1
    assert documents_of(load_corpus(settings)) == first
    assert documents_of(load_corpus(config(tmp_path, tmp_path / "text", seed=3, held_out=0.5))) == first
    assert len(calls) == 1


def test_the_digest_is_of_the_tokens_wherever_they_lie(tmp_path):
    digests = {}
    for name, texts in (("a", None), ("b", None), ("c", "longer than it was")):
        folder = write_texts(tmp_path / name)
        if texts:
            (folder / "000.txt").write_text(texts)
        digests[name] = load_corpus(config(tmp_path, folder))[0].digest
    assert len(digests["a"]) == 16
    assert digests["a"] == digests["b"] != digests["c"]


@pytest.mark.parametrize("change", ["size", "time", "neither", "new file", "vocabulary", "eos", "format"])
def test_whatever_decides_the_tokens_makes_another_cache(tmp_path, change):
    folder, tokenizer = write_texts(tmp_path / "text"), tmp_path / "tokenizer"
    write_tokenizer(tokenizer, bos="<bos>")
    settings = {"tokenizer": str(tokenizer)}
    tokenised(config(tmp_path, folder, **settings))
    if change == "size":
        (folder / "000.txt").write_text("longer than it was")
    elif change == "time":
        os.utime(folder / "000.txt", ns=(1, 1))
    elif change == "neither":
        before = (folder / "000.txt").stat()
        (folder / "000.txt").write_text("two")
        os.utime(folder / "000.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "new file":
        (folder / "new.txt").write_text("new")
    elif change == "vocabulary":
        write_tokenizer(tokenizer, words=("two", "one"), bos="<bos>")
    elif change == "eos":
        saved = tokenizer / "tokenizer_config.json"
        saved.write_text(saved.read_text().replace('"eos_token": "<eos>"', '"eos_token": "<bos>"'))
    else:
        settings["format"] = "text"
    tokenised(config(tmp_path, folder, **settings))
    assert len(entries(tmp_path)) == 2


def dying(death, after):
    """Writer.add, which raises `death` instead of a call."""
    add, calls = cache.Writer.add, itertools.count()

    def add_or_die(writer, group):
        if next(calls) == after:
            raise death
        add(writer, group)

    return add_or_die


@pytest.fixture
def in_groups(monkeypatch):
    """A group per record, and progress after each."""
    monkeypatch.setattr(build, "GROUP", 1)
    monkeypatch.setattr(build, "SECONDS", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.mark.parametrize("kind", ["texts", "labels"])
@pytest.mark.parametrize("death", [KeyboardInterrupt(), OSError(28, "No space left")], ids=["killed", "disk full"])
def test_a_build_that_is_stopped_continues_where_it_stopped(tmp_path, monkeypatch, capsys, in_groups, kind, death):
    settings = config(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["", *TEXTS[1:], *TEXTS]))
    if kind == "labels":
        rows = [{"input_ids": [5 + i]} | ({"labels": [-100]} if i > 6 else {}) for i in range(12)]
        rows[1]["input_ids"] = "malformed"
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = config(tmp_path, tmp_path / "a.jsonl", field="input_ids", malformed="skip")
    at_once = tokenised(dataclasses.replace(settings, cache=str(tmp_path / "at once")))
    with monkeypatch.context() as patch:
        patch.setattr(cache.Writer, "add", dying(death, after=8))
        with pytest.raises((KeyboardInterrupt, ConfigError)):
            tokenised(settings)
    rest = Mock(wraps=build._encoded)
    monkeypatch.setattr(build, "_encoded", rest)
    capsys.readouterr()
    made = tokenised(settings)
    assert rest.call_count == 12 - 8
    printed = capsys.readouterr().out
    assert f"data.path={settings.path}: a stopped run left " in printed
    assert ("1 empty documents are left out" in printed) == (kind == "texts")  # it was counted before the stop
    assert len(entries(tmp_path)) == 1
    assert made.contents == at_once.contents
    assert made.contents["skipped"] == (kind == "labels")
    [folder] = entries(tmp_path)
    [other] = (tmp_path / "at once").iterdir()
    files = sorted(file.name for file in folder.iterdir())
    assert files == sorted(file.name for file in other.iterdir())
    assert filecmp.cmpfiles(folder, other, files, shallow=False) == (files, [], [])


def test_a_build_whose_input_is_refused_leaves_nothing(tmp_path, monkeypatch, in_groups):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl line 2"):
        tokenised(config(tmp_path, tmp_path / "a.jsonl"))
    assert entries(tmp_path) == []


def test_workers_give_the_arrays_of_one_process_and_end_with_a_killed_builder(tmp_path, monkeypatch):
    folder = write_texts(tmp_path / "text", [text * 99 for text in TEXTS])
    some, long = TEXTS * 50, "a line of JSON that is longer than a group " * 50
    settings = config(tmp_path, write_jsonl(folder / "a.jsonl", [*some, long, *some]), files=["*"])
    one = tokenised(dataclasses.replace(settings, cache=str(tmp_path / "one")))
    monkeypatch.setattr(build, "GROUP", 1000)
    monkeypatch.setattr(formats, "LINES", 500)
    monkeypatch.setattr(build, "SECONDS", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    builder = multiprocessing.get_context("fork").Process(target=pause_after, args=(settings, 20))
    builder.start()
    while len(workers := psutil.Process(builder.pid).children()) < 2 or not any(map(written, entries(tmp_path))):
        assert builder.is_alive()
        time.sleep(0.01)
    builder.kill()
    builder.join()
    assert not psutil.wait_procs(workers, timeout=10)[1]
    made = tokenised(settings)
    assert all(np.array_equal(a, b) for a, b in zip(made[:2], one[:2], strict=True))
    assert made.contents == one.contents


def pause_after(settings, groups):
    """A builder that writes some groups."""
    add, calls = cache.Writer.add, itertools.count()
    cache.Writer.add = lambda *args: add(*args) if next(calls) < groups else signal.pause()
    tokenised(settings)


def written(folder):
    """Whether an unfinished build has progress."""
    return build.read_progress(folder / "built").written.pieces >= 20


def test_abandoned_folders_of_other_names_are_deleted_after_a_week(tmp_path):
    for name in ("young", "old"):
        with scratch_folder(tmp_path / "cache", name) as folder:
            kept = shutil.copytree(folder, tmp_path / name)
        kept.rename(folder)
    os.utime(folder, (1, 1))
    with scratch_folder(tmp_path / "cache", "name") as own:
        scratch.delete_abandoned(own, "name")
    assert [entry.name.split(".")[0] for entry in entries(tmp_path)] == ["young"]


def build_until_killed(settings):
    """A builder that never completes its arrays."""
    cache.np.save = lambda *_: signal.pause()
    tokenised(settings)


def test_what_a_killed_builder_leaves_is_not_taken_for_a_cache_and_is_deleted_by_the_next(tmp_path):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    builder = multiprocessing.get_context("fork").Process(target=build_until_killed, args=(settings,))
    builder.start()
    while not list(tmp_path.glob("cache/*/built/tokens.npy")):
        assert builder.is_alive()
        time.sleep(0.01)
    name = entries(tmp_path)[0].name.split(".")[0]
    with scratch_folder(tmp_path / "cache", name) as own:
        scratch.delete_abandoned(own, name)
        assert len(entries(tmp_path)) == 2  # that of the living builder is left alone
    builder.kill()
    builder.join()
    [left] = entries(tmp_path)
    assert ".unfinished-" in left.name
    assert len(documents_of(load_corpus(settings))) == len(TEXTS)
    assert [entry.name for entry in entries(tmp_path)] == [left.name.split(".")[0]]


def test_scratch_folders_of_other_hosts_are_left_alone(tmp_path):
    other = tmp_path / "cache" / "name.unfinished-another host-x"
    other.mkdir(parents=True)
    with scratch_folder(tmp_path / "cache", "name") as own:
        scratch.delete_abandoned(own, "name")
        assert scratch.others(own, "name") == [other]
    assert entries(tmp_path) == [other]


def test_a_file_system_without_locks_still_has_scratch_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.fcntl, "flock", Mock(side_effect=OSError(38, "Function not implemented")))
    with scratch_folder(tmp_path / "cache", "a") as first, scratch_folder(tmp_path / "cache", "b") as second:
        assert first.exists()
        assert second.exists()
    assert entries(tmp_path) == []


def test_a_builder_that_finishes_second_takes_the_first_ones_cache(tmp_path, monkeypatch):
    settings, build = config(tmp_path, write_texts(tmp_path / "text")), documents._build

    def overtaken(*args):
        monkeypatch.setattr(documents, "_build", build)
        tokenised(settings)
        build(*args)

    monkeypatch.setattr(documents, "_build", overtaken)
    made = tokenised(settings)
    [folder] = entries(tmp_path)
    assert np.array_equal(made.tokens, np.load(folder / "tokens.npy"))
    assert len(documents_of(load_corpus(settings))) == len(TEXTS)


# -- damage


def corpus_json(change):
    """Damage to corpus.json: its object, changed."""

    def damage(folder):
        contents = json.loads((folder / "corpus.json").read_text())
        (folder / "corpus.json").write_text(json.dumps(change(contents)))

    return damage


def overwritten(name, begin, count):
    """Damage to a file: bytes that are flipped, from `begin` (from its end, if negative)."""

    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        begin_at = begin % len(content)
        for i in range(begin_at, begin_at + count):
            content[i] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


def saved(name, change):
    """Damage to a file: an array that is sound in itself, but another one."""
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


DAMAGE = {
    "tokens overwritten": (overwritten("tokens.npy", -100, 90), "tokens.npy or offsets.npy has other contents than"),
    "one byte of the tokens": (overwritten("tokens.npy", -1, 1), "tokens.npy or offsets.npy has other contents than"),
    "tokens truncated": (lambda f: os.truncate(f / "tokens.npy", 200), "tokens.npy cannot be read: "),
    "tokens empty": (lambda f: os.truncate(f / "tokens.npy", 0), "tokens.npy cannot be read: "),
    "tokens missing": (lambda f: (f / "tokens.npy").unlink(), "tokens.npy cannot be read: [Errno 2] No such file"),
    "tokens' magic": (overwritten("tokens.npy", 0, 6), "tokens.npy cannot be read: "),
    "tokens' header": (overwritten("tokens.npy", 10, 40), "tokens.npy cannot be read: "),
    "tokens of another type": (saved("tokens.npy", lambda x: x.astype(np.int64)), "tokens.npy holds int64 ["),
    "tokens of another shape": (saved("tokens.npy", lambda x: x[None]), "tokens.npy holds uint16 [1, "),
    "fewer tokens": (saved("tokens.npy", lambda x: x[:-1]), "tokens.npy holds uint16 ["),
    "offsets of another type": (
        saved("offsets.npy", lambda x: x.astype(float)),
        "offsets.npy holds float64 [7], not",
    ),
    "offsets beyond the tokens": (saved("offsets.npy", lambda x: x + 1), "offsets.npy does not divide"),
    "offsets out of order": (
        saved("offsets.npy", lambda x: x[[0, 2, 1, *range(3, len(x))]]),
        "offsets.npy does not",
    ),
    "other offsets": (saved("offsets.npy", lambda x: x + [0, 1, 0, 0, 0, 0, 0]), "tokens.npy or offsets.npy has other"),
    "offsets missing": (lambda f: (f / "offsets.npy").unlink(), "offsets.npy cannot be read: [Errno 2] No such file"),
    "contents empty": (lambda f: os.truncate(f / "corpus.json", 0), "corpus.json cannot be read: Expecting value"),
    "contents nested": (lambda f: (f / "corpus.json").write_text("[" * 99999), "corpus.json cannot be read: maxi"),
    "contents missing": (lambda f: (f / "corpus.json").unlink(), "corpus.json cannot be read: [Errno 2] No such file"),
    "contents null": (corpus_json(lambda _: None), "corpus.json holds a NoneType, not an object"),
    "contents a list": (corpus_json(lambda _: [1]), "corpus.json holds a list, not an object"),
    "contents not text": (overwritten("corpus.json", 0, 9), "corpus.json cannot be read: 'utf-8' codec"),
    "contents of another format": (
        corpus_json(lambda c: c | {"format": 3}),
        f"corpus.json has format 3, not {cache.FORMAT}",
    ),
    "contents without a key": (
        corpus_json(lambda c: {"format": cache.FORMAT}),
        "corpus.json has other contents than",
    ),
    "another vocabulary": (
        corpus_json(lambda c: c | {"vocabulary": 3}),
        "corpus.json has other contents than",
    ),
    "another digest": (
        corpus_json(lambda c: c | {"digest": "0" * 16}),
        "corpus.json has other contents than",
    ),
    "a file in its place": (lambda f: f.rename(f.parent / "x") and f.write_text(""), "corpus.json cannot be read: "),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cache_is_made_again_with_a_word(tmp_path, capsys, calls, case):
    damage, message = DAMAGE[case]
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    sound = documents_of(load_corpus(settings))
    [folder] = entries(tmp_path)
    damage(folder)
    capsys.readouterr()
    assert documents_of(load_corpus(settings)) == sound
    printed = capsys.readouterr().out
    assert printed.startswith(f"{folder}: {message}")
    assert printed.endswith(f"; tokenising data.path={settings.path} again\n")
    assert documents_of(load_corpus(settings)) == sound
    assert (capsys.readouterr().out, len(calls)) == ("", 2)


def test_tokens_are_compared_with_their_digest_only_where_that_is_asked_for(tmp_path, calls):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    load_corpus(settings)
    overwritten("tokens.npy", -1, 1)(entries(tmp_path)[0])
    load_corpus(settings, verify=False)
    assert len(calls) == 1
    load_corpus(settings)
    assert len(calls) == 2


def test_a_damaged_cache_whose_folder_cannot_be_written_is_refused(tmp_path, monkeypatch):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    load_corpus(settings)
    overwritten("tokens.npy", -1, 1)(entries(tmp_path)[0])
    monkeypatch.setattr(tempfile, "mkdtemp", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match=r"data\.cache=.* cannot be written: Permission denied"):
        load_corpus(settings)


@pytest.mark.parametrize(
    "full", [OSError(28, "No space left on device"), OSError("9 requested and 0 written")], ids=str
)
def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch, full):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    monkeypatch.setattr(cache.np, "save", Mock(side_effect=full))
    message = rf"^data\.cache={settings.cache} cannot be written: {full.strerror or full}$"
    with pytest.raises(ConfigError, match=message):
        load_corpus(settings)


def test_a_corpus_that_is_in_use_outlives_the_damage_of_its_cache(tmp_path):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    used = load_corpus(settings)
    before = documents_of(used)
    [folder] = entries(tmp_path)
    (folder / "corpus.json").unlink()
    load_corpus(settings)
    assert documents_of(used) == before


@pytest.mark.parametrize("step", ["_build", "_move"], ids=["nothing there", "damaged"])
def test_those_who_build_at_once_all_get_the_whole_corpus(tmp_path, monkeypatch, step):
    settings = config(tmp_path, write_texts(tmp_path / "text"))
    if step == "_move":
        load_corpus(settings)
        overwritten("tokens.npy", -1, 1)(entries(tmp_path)[0])
    load_tokenizer(settings.tokenizer)  # its imports are not for threads
    at_once, taken = threading.Barrier(4), getattr(documents, step)

    def together(*args):
        at_once.wait(120)  # until all have found the damage, or nothing
        taken(*args)

    monkeypatch.setattr(documents, step, together)
    with ThreadPoolExecutor(4) as builders:
        corpora = list(builders.map(load_corpus, [settings] * 4))
    monkeypatch.setattr(documents, step, Mock(side_effect=AssertionError("built again")))
    assert len(entries(tmp_path)) == 1
    assert [documents_of(got) for got in corpora] == [documents_of(load_corpus(settings))] * 4
