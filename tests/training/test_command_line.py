"""A command line is read as typed, and an error is one line that names the setting and its value."""

import copy
import functools
import math
import os
import re
import shutil
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
import yaml

from ringflash.data import DataConfig, load_tokenizer
from ringflash.data.documents import find_files
from ringflash.errors import ConfigError, shown
from ringflash.models import ModelConfig, build_model, read_config
from ringflash.training.compose import built, compose
from ringflash.training.config import Config
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.other_names import OTHER_NAMES
from ringflash.training.overrides import kind_of
from ringflash.training.preflight import check_ranks
from tests import forked

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
        "name='1e5'", 'data.field="a b"', "data.path=${oc.env:CORPUS}/x=y", "output_dir=~/runs", r"data.cache=\${x}",
        "parallel.ring=null", "optim.lr='1e-4'", "optim.final_lr=${optim.lr}", "data.files=['a=b.txt', *.md]",
        "model.architecture.max_position_embeddings=16", "+model.architecture.name_or_path='/x/a=b'",
    )  # fmt: skip
    assert (config.name, config.data.field, config.data.path) == ("1e5", "a b", "/home/é=1/x=y")
    assert (config.output_dir, config.data.cache) == ("/home/me/runs", "${x}")
    assert (config.parallel.ring, config.optim.lr, config.optim.final_lr) == (None, 1e-4, 1e-4)
    assert config.data.files == ["a=b.txt", "*.md"]
    assert config.model.architecture["max_position_embeddings"] == 16
    assert config.model.architecture["name_or_path"] == "/x/a=b"


def test_the_last_of_two_values_counts_and_a_group_can_be_dropped():
    config, _ = composed("optim=adamw", "name=a", "optim=demo", "name=b")
    assert (config.optim.steps, config.name) == (60, "b")
    assert compose(["~optim"])[0].optim == compose(["~optim=demo"])[0].optim == OptimConfig()


# -- bad lines

UNREADABLE = {
    "foo": "'foo' is not of the form key=value",
    "=1": "'=1' is not of the form key=value",
    "==": "'==' is not of the form key=value",
    "experiment=null": "experiment=null is not one of 128k, 128k-8gpus, 1m, 1m-8gpus, 256k",
    "experiment=1": "experiment=1 is not one of",
    "experiment=../model/tiny-llama": "experiment=../model/tiny-llama is not one of",
    "experiment=": "experiment= is not one of",
    "optim=null": "optim=null is not one of adamw, demo",
    "optim=true": "optim=true is not one of adamw, demo",
    "optim=[adamw,demo]": "optim=[adamw,demo] is not one of adamw, demo",
    "+optim=adamw": "+optim=adamw: optim is set already; leave out the +",
    "++optim=adamw": "optim is set already; leave out the +",
    "+optim.lr=1": "+optim.lr=1: optim.lr is set already; leave out the +",
    "~optim.lr": "~optim.lr would remove a setting",
    "~data.path=x": "~data.path=x would remove a setting",
    "Data.path=/x/a=b": "Data.path is not a setting; did you mean data.path?",
    "num_train_epochs=3": "num_train_epochs is not a setting; did you mean optim.epochs?",
    "optim.warmup_ratio=0.1": "optim.warmup_ratio is not a setting; did you mean optim.warmup?",
    "lr=1": "lr is not a setting; did you mean optim.lr?",
    "optim.LR=1": "optim.LR is not a setting; did you mean optim.lr?",
    "preference.loss=ipo": "preference.loss is not a setting; did you mean preference.loss_type?",
    "checkpoint.at=x": "checkpoint.at is not a setting; checkpoint has every, every_minutes, keep, keep_best",
    "model.lora.r=8": "model.lora.r is not a setting; model.lora has rank, alpha, dropout, targets",
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
    "data.files=*.txt,*.md": """must be a list of text in quotes, such as 'data.files=["*.txt","*.md"]'""",
    "data.files='[\"*.txt\"]'": """must be a list of text in quotes, such as 'data.files=["*.txt"]'""",
    "data.files=[ü.txt]": """needs quotes, such as 'data.files=["ü.txt"]'""",
    "data.files=": """data.files= must be a list of text in quotes, such as 'data.files=["*.txt"]'""",
    "data.files=[1e5]": "data.files=[1e5] must be a list of text in quotes",
    "data.files=[null]": "data.files=[null] must be a list of text in quotes",
    "data.files=[a=b]": "data.files=[a=b] does not parse: text of other than letters, digits and -_./ needs quotes",
    "data.files=null": "data.files=null must be a list",
    "model.architecture=null": "model.architecture=null must be a dictionary",
    "model.architecture.hidden_act=a=b": """needs quotes, such as 'model.architecture.hidden_act="a=b"'""",
    "model.architecture.hidden_size=8,16": "model.architecture.hidden_size=8,16 has several values",
    "data.path=${HOME}": "data.path=${HOME}: Interpolation key 'HOME' not found; ${oc.env:NAME}",
    "data.path=${": "data.path=${: ",
    "data.path=???": "data.path is not set",
    "data.path=~no-such-user/x": "data.path=~no-such-user/x names no user of this machine",
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


def test_names_of_other_trainers_lead_to_settings_as_their_table_says():
    assert all(kind_of(key, Config) is not None for key in OTHER_NAMES.values())
    page = (Path(__file__).parents[2] / "docs/fine-tuning.md").read_text()
    rows = [line.split("|") for line in page.split("## Coming from another trainer")[1].split("\n## ")[0].splitlines()]
    listed = {name: row[1].strip(" `") for row in rows for cell in row[2:] for name in re.findall(r"`(\w+)`", cell)}
    assert listed.items() <= OTHER_NAMES.items()
    assert len(listed) > 35


# -- numbers: what a setting takes of values at and beyond its ends

ENDS = {int: [-1, 0, 2**31, 2**64, 10**30], float: [-math.inf, -1.0, 0.0, 5e-324, 1.5, 1e308, math.inf, math.nan]}
TAKEN = {
    "seed": [0, 2**31], "data.seed": [0, 2**31], "data.held_out": [0.0, 5e-324], "memory.zero": [0],
    "evaluation.every": [0], "evaluation.needle.every": [0], "evaluation.needle.depths": [0],
    "checkpoint.every": [0], "checkpoint.every_minutes": [0.0, 5e-324, 1.5, 1e308], "optim.warmup": [0.0, 5e-324],
    "optim.lr": [0.0, 5e-324, 1.5, 1e308],
    "optim.final_lr": [0.0, 5e-324], "optim.beta1": [0.0, 5e-324],
    "optim.beta2": [0.0, 5e-324], "optim.weight_decay": [0.0, 5e-324, 1.5, 1e308],
    "model.neftune_alpha": [0.0, 5e-324, 1.5, 1e308],
    "model.lora.dropout": [0.0], "preference.label_smoothing": [0.0], "preference.sft_weight": [0.0],
    "optim.clip": [0.0, 5e-324, 1.5, 1e308], "parallel.intra_node_bandwidth_gb": [1.5, 1e308],
    "parallel.inter_node_bandwidth_gb": [1.5, 1e308], "parallel.hop_timeout_seconds": [5e-324, 1.5],
}  # fmt: skip


def numbers(part=Config, prefix=""):
    """The keys of all settings that are numbers, with int or float."""
    for name, kind in get_type_hints(part).items():
        if is_dataclass(kind):
            yield from numbers(kind, f"{prefix}{name}.")
        elif bases := {int, float} & {kind, *get_args(kind)}:
            yield prefix + name, bases.pop()


@pytest.fixture(scope="module")
def settings():
    return asdict(compose(["memory.recompute=true"])[0])


def in_place_of(settings, key, value):
    """The value as the setting has it: in a tuple where it is a list."""
    return (value,) if isinstance(functools.reduce(dict.__getitem__, key.split("."), settings), tuple) else value


def outcome(settings, key, value):
    """The line that refuses a value on one rank, or None."""
    changed = copy.deepcopy(settings)
    *groups, name = key.split(".")
    functools.reduce(dict.__getitem__, groups, changed)[name] = in_place_of(settings, key, value)
    try:
        check_ranks(built(Config, changed), 1)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize(("key", "kind"), [*numbers()])
def test_a_number_is_taken_where_a_run_can_have_it_and_else_refused_with_its_key_and_value(settings, key, kind):
    outcomes = {value: outcome(settings, key, value) for value in ENDS[kind]}
    assert [value for value, line in outcomes.items() if line is None] == TAKEN.get(key, [])
    given = {value: f"{key}={shown(in_place_of(settings, key, value))}" for value in outcomes}
    assert all(line is None or given[value] in line for value, line in outcomes.items())


@pytest.mark.parametrize("key", ["name", "seed", "optim.lr", "memory.recompute", "logger.mode", "data.tokenizer"])
def test_null_is_refused_where_a_value_is_needed(key):
    assert f"{key}=null must be " in refusal(lambda: compose([f"{key}=null"]))


WRONG_TEXT = {
    "output_dir=": "output_dir= must be a folder",
    "logger.project=a/b": "logger.project=a/b must be 1 to 128 characters",
    "logger.project=": "logger.project= must be",
    "data.field=": "data.field= must be",
}


@pytest.mark.parametrize("override", WRONG_TEXT)
def test_text_that_a_run_could_not_use_is_refused(override):
    assert WRONG_TEXT[override] in refusal(lambda: compose([override]))


@pytest.mark.parametrize("option", ["--foo", "--print=yes"])
def test_an_option_that_train_py_does_not_have_is_named_alone(option):
    arguments = [sys.executable, "train.py", "optim.lr=1", "--print", "name=x", option]
    result = forked.run(arguments)
    line = f"ringflash: {option} is not an option: settings are key=value, see --help"
    assert result.returncode == 1
    assert line in result.stderr.splitlines()
    assert "usage" not in result.stderr


def test_a_path_whose_characters_the_output_lacks_is_printed_with_escapes(tmp_path):
    folder = os.fsencode(tmp_path) + "/né".encode() + b"\xff"
    os.mkdir(folder)
    Path(os.fsdecode(folder), "a.txt").write_text("text")
    settings = ["experiment=debug", b"data.path=" + folder, "data.files=[a.txt]"]
    arguments = [sys.executable, "train.py", "--print", *settings]
    result = forked.run(arguments, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert result.returncode == 0, result.stderr
    assert f"{tmp_path}/n\\xe9\\uDCFF" in result.stdout


# -- models that cannot be

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None,
}  # fmt: skip
SIZES = [
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings",
]  # fmt: skip
WRONG_SIZES = [0, -1, 1.5, math.nan, math.inf, 10**19, 2**31, "abc", "", [1], True]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WRONG_FIELDS = {
    "hidden_size=30": ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
    "7 kv heads": ({"num_key_value_heads": 7}, "num_attention_heads=4 is not divisible by num_key_value_heads=7"),
    "an odd head": ({"head_dim": 7}, "head_dim=7 must be even and 2 or more"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size=None must be int"),
    "too large": ({"intermediate_size": 2**30}, "model.architecture has 206,1"),
    "pad": ({"pad_token_id": 97}, "pad_token_id=97 must be null or 0 or more and below vocab_size=97"),
    "eos": ({"eos_token_id": [1, -1]}, "eos_token_id=[1, -1] must be null or"),
    "epsilon": ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan must be 0 or more and finite"),
    "deviation": ({"initializer_range": -1.0}, "initializer_range=-1.0 must be 0 or more"),
    "activation": ({"hidden_act": "foo"}, "hidden_act=foo is not one of "),
    "theta": ({"rope_parameters": ROPE | {"rope_theta": 0.0}}, "rope_parameters.rope_theta=0.0 must be above 0"),
    "no theta": ({"rope_parameters": ROPE | {"rope_theta": None}}, "rope_parameters.rope_theta=None must be a number"),
    "rope": ({"rope_parameters": ROPE | {"rope_type": "foo"}}, "rope_parameters.rope_type=foo is not supported"),
    "linear": ({"rope_parameters": ROPE | {"rope_type": "linear"}}, "lacks 'factor'"),
    "unused": ({"rope_parameters": ROPE | {"factor": 2.0}}, "factor=2.0 has no effect with rope_parameters.rope_type"),
    "attentions": ({"output_attentions": True}, "output_attentions=True is not supported"),
    "tuples": ({"return_dict": False}, "return_dict=False is not supported"),
}  # fmt: skip


def built_on_meta(**fields):
    with torch.device("meta"):
        return build_model(ModelConfig(architecture=LLAMA | fields))


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_no_model_has_is_refused_with_its_key_and_value(size):
    for value in WRONG_SIZES:
        line = refusal(lambda value=value: built_on_meta(**{size: value}))
        assert f"model.architecture.{size}={value}" in line or f"model.architecture.{size}={value!r}" in line
    built_on_meta(**({size: LLAMA[size]} if size in LLAMA else {size: 7}))


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_field_that_no_model_has_is_refused_before_it_is_built(fields, message):
    line = refusal(lambda: built_on_meta(**fields))
    assert line.startswith("model.architecture")
    assert message in line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    build_model(ModelConfig(architecture=LLAMA, dtype="fp32")).save_pretrained(folder)
    return folder


def cut(weights):
    return weights[: len(weights) // 2]


WRONG_FOLDERS = {
    "not JSON": ("config.json", lambda text: b'{"a":', "config.json cannot be read: Expecting value"),
    "empty": ("config.json", lambda text: b"", "config.json cannot be read: Expecting value"),
    "binary": ("config.json", lambda text: b"\xff\xfe", "config.json cannot be read: 'utf-8' codec"),
    "a list": ("config.json", lambda text: b"[]", "model_type=None is not one of transformers"),
    "no type": ("config.json", lambda text: text.replace(b"model_type", b"kind"), "model_type=None is not one of"),
    "another type": ("config.json", lambda text: text.replace(b'"llama"', b'"gpt2"'), "model_type=gpt2 is not"),
    "-1 layers": ("config.json", lambda text: text.replace(b'layers": 2', b'layers": -1'), "num_hidden_layers=-1 must"),
    "1 layer": ("config.json", lambda text: text.replace(b'layers": 2', b'layers": 1'), "has 9 weights that its"),
    "3 layers": ("config.json", lambda text: text.replace(b'layers": 2', b'layers": 3'), "lacks 9 weights"),
    "vocabulary": ("config.json", lambda text: text.replace(b": 97", b": 98"), "[97, 32], and its config.json asks"),
    "text": ("config.json", lambda text: text.replace(b": 97", b': "97"'), "vocab_size='97' must be int"),
    "no weights": ("model.safetensors", lambda weights: None, "cannot be loaded: Error no file named"),
    "cut weights": ("model.safetensors", cut, "cannot be loaded: Error while deserializing header: incomplete"),
    "long header": ("model.safetensors", lambda weights: b"\xff" * 8 + weights[8:], "header too large"),
    "wrong header": ("model.safetensors", lambda weights: weights[:8] + b"x" * 9999, "deserializing header: invalid"),
    "empty weights": ("model.safetensors", lambda weights: b"", "header too small"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_a_broken_model_folder_is_refused_in_one_line_with_its_path(folder, tmp_path, name, change, message):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    changed = change((folder / name).read_bytes())
    (broken / name).unlink()
    if changed is not None:
        (broken / name).write_bytes(changed)
    line = refusal(lambda: build_model(ModelConfig(path=str(broken), dtype="fp32")))
    assert line.startswith(f"model.path={broken}")
    assert message in line


def test_paths_that_lead_nowhere_are_refused_whatever_their_length(tmp_path):
    for nowhere in ("/nothing", str(tmp_path), __file__, "a" * 300, "a/" * 3000):
        assert f"model.path={nowhere} holds no config.json" in refusal(
            lambda x=nowhere: read_config(ModelConfig(path=x))
        )
    for nowhere in ("/nothing", "a" * 300):
        assert f"data.path={nowhere} does not exist" in refusal(lambda x=nowhere: find_files(DataConfig(path=x)))
        assert f"data.tokenizer={nowhere} is neither bytes nor a folder" in refusal(lambda x=nowhere: load_tokenizer(x))
    hub = "org/Name-1.5"
    for load in (lambda: read_config(ModelConfig(path=hub)), lambda: load_tokenizer(hub)):
        assert refusal(load).endswith(
            f"; nothing is downloaded: `hf download {hub} --local-dir FOLDER` downloads a model from the hub"
        )
    assert refusal(lambda: find_files(DataConfig(path=hub))) == (
        f"data.path={hub} does not exist; nothing is downloaded: `hf download {hub} --repo-type dataset --local-dir "
        f"FOLDER` downloads a data set from the hub"
    )
    assert refusal(lambda: find_files(DataConfig(path="corpus"))) == "data.path=corpus does not exist"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert f"model.path={tmp_path} holds an adapter of peft: merge it" in refusal(
        lambda: read_config(ModelConfig(path=str(tmp_path)))
    )
    (tmp_path / "tokenizer.json").write_text("{")
    assert f"data.tokenizer={tmp_path} holds no loadable tokenizer" in refusal(lambda: load_tokenizer(str(tmp_path)))
