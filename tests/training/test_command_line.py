"""A command line is read as it was typed, and a bad one ends in one line that names the setting and its value."""

import pytest
import yaml

from ringflash.errors import ConfigError
from ringflash.training.config import compose

# -- text as typed

NAMES = ["1e5", "1_000", "true", "0x10", "2026-01-01", "010", "1.50", "nan", "NULL", "no", "é", "日本"]
PATHS = [
    "/x/a=b/(c)[d]~#&é", "/x y", "/x,y", "it's", 'a"b', "'x", "C:\\x\\", "\\'", "$HOME/x", "/x/{a}", "[d]", "{a: b}",
    "a@b", "x;y|z", "`x`", "50%", "a:b", "?*", "日本/ü", " x ", "choice(a,b)", "str(1)", "=", "--x", "null/x", "~x",
]  # fmt: skip


def composed(*overrides):
    """The settings of a command line with a name and a path of text, typed and as YAML reads them back."""
    config, resolved = compose(overrides)
    return config, yaml.safe_load(resolved)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_text_that_was_typed(name):
    config, resolved = composed(f"name={name}")
    assert config.name == resolved["name"] == name


def test_every_text_setting_takes_any_characters_as_typed():
    keys = ("path", "field", "cache", "tokenizer")
    for i in range(0, len(PATHS), len(keys)):
        typed = {key: f"x{path}" for key, path in zip(keys, PATHS[i:], strict=False)}
        config, resolved = composed(*(f"data.{key}={path}" for key, path in typed.items()))
        assert {key: getattr(config.data, key) for key in typed} == typed
        assert {key: resolved["data"][key] for key in typed} == typed


def test_quotes_null_and_interpolation_keep_their_meaning(monkeypatch):
    monkeypatch.setenv("CORPUS", "/home/é=1")
    monkeypatch.setenv("HOME", "/home/me")
    config, _ = composed(
        "name='1e5'", 'data.field="a b"', "data.path=${oc.env:CORPUS}/x=y", "runs=~/runs", r"data.cache=\${x}",
        "parallel.ring=null", "optim.lr='1e-4'", "optim.final_lr=${optim.lr}", "data.files=['a=b.txt', *.md]",
        "model.architecture.max_position_embeddings=16", "+model.architecture.name_or_path='/x/a=b'",
    )  # fmt: skip
    assert (config.name, config.data.field, config.data.path) == ("1e5", "a b", "/home/é=1/x=y")
    assert (config.runs, config.data.cache) == ("/home/me/runs", "${x}")
    assert (config.parallel.ring, config.optim.lr, config.optim.final_lr) == (None, 1e-4, 1e-4)
    assert config.data.files == ["a=b.txt", "*.md"]
    assert config.model.architecture["max_position_embeddings"] == 16
    assert config.model.architecture["name_or_path"] == "/x/a=b"


def test_the_last_of_two_values_counts_and_a_group_can_be_dropped():
    config, _ = composed("optim=adamw", "name=a", "optim=demo", "name=b", "~checkpoint", "~evaluation=default")
    assert (config.optim.steps, config.name, config.checkpoint.every) == (60, "b", 100)


# -- bad lines

UNREADABLE = {
    "foo": "'foo' is not of the form key=value",
    "=1": "'=1' is not of the form key=value",
    "==": "'==' is not of the form key=value",
    "experiment=null": "experiment=null is not one of llama3-8b-256k, qwen3-0.5b-128k",
    "experiment=1": "experiment=1 is not one of",
    "experiment=../model/tiny-llama": "experiment=../model/tiny-llama is not one of",
    "experiment=": "experiment= is not one of",
    "optim=null": "optim=null is not one of adamw, demo",
    "optim=true": "optim=true is not one of adamw, demo",
    "optim=[adamw,demo]": "optim=[adamw,demo] is not one of adamw, demo",
    "+optim=adamw": "+optim=adamw: optim is set already; leave out the +",
    "++optim=adamw": "optim is set already; leave out the +",
    "+optim.lr=1": "+optim.lr=1: optim.lr is set already; leave out the +",
    "~optim.lr": "~optim.lr removes a setting",
    "~data.path=x": "~data.path=x removes a setting",
    "Data.path=/x/a=b": "Data.path is not a setting; did you mean data.path?",
    "hydra.run.dir=x": "hydra.run.dir is not a setting",
    "hydra/launcher=basic": "hydra/launcher is not a setting",
    "/etc=x": "/etc is not a setting",
    "optim.lr.x=1": "optim.lr.x is not a setting",
    "optim.lr=a=b": "optim.lr=a=b must be a number",
    "optim.lr=1,2": "optim.lr=1,2 must be a number",
    "optim.lr=": "optim.lr= must be a number",
    "optim.steps=1e5": "optim.steps=1e5 must be a whole number",
    "optim.steps=8k": "optim.steps=8k must be a whole number",
    "parallel.ring=all": "parallel.ring=all must be a whole number or null",
    "memory.recompute=2": "memory.recompute=2 must be true or false",
    "memory.recompute=maybe": "memory.recompute=maybe must be true or false",
    "data.files=*.txt": """data.files=*.txt must be a list of text in quotes, such as 'data.files=["*.txt"]'""",
    "data.files=[1e5]": "data.files=[1e5] must be a list of text in quotes",
    "data.files=[null]": "data.files=[null] must be a list of text in quotes",
    "data.files=[a=b]": "data.files=[a=b] does not parse: text with other than letters, digits and -_./ needs quotes",
    "data.files=null": "data.files=null must be a list",
    "model.architecture=null": "model.architecture=null must be a dictionary",
    "model.architecture.hidden_act=a=b": """needs quotes, such as 'model.architecture.hidden_act="a=b"'""",
    "model.architecture.hidden_size=8,16": "model.architecture.hidden_size=8,16 holds several values",
    "data.path=${HOME}": "data.path=${HOME}: Interpolation key 'HOME' not found; ${oc.env:NAME}",
    "data.path=${": "data.path=${: ",
    "data.path=???": "data.path is not set",
    "data.path=~no-such-user/x": "data.path=~no-such-user/x names no home folder",
    "seed=${data.path}": "seed=${data.path} must be a whole number",
}  # fmt: skip


def refusal(act):
    """The one line of a refused setting."""
    with pytest.raises(ConfigError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("override", UNREADABLE)
def test_a_line_that_cannot_be_read_is_refused_with_its_key_and_value(override):
    assert UNREADABLE[override] in refusal(lambda: compose([override]))
