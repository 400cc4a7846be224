"""Every configuration composes, and a wrong key or value fails at once with the name of the key."""

import re
from dataclasses import is_dataclass
from typing import get_type_hints

import pytest
from omegaconf import OmegaConf

from ringflash.errors import ConfigError
from ringflash.models import ModelConfig
from ringflash.training.compose import CONFIGS, _schema, compose
from ringflash.training.config import Config
from ringflash.training.help import settings_help
from ringflash.training.overrides import RENAMED
from ringflash.training.preflight import check_ranks

EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
GROUPS = [
    (group.name, path.stem)
    for group in sorted(CONFIGS.iterdir())
    if group.is_dir() and group.name != "experiment"
    for path in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_names_its_run(name):
    config, resolved = compose([f"experiment={name}", "data.path=somewhere"])
    assert config.name == name
    assert f"name: {name}" in resolved


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_takes_a_pretrained_model_and_other_data(name):
    other = ["model=pretrained", "model.path=folder", "data=csv", "data.path=somewhere"]
    config, _ = compose([f"experiment={name}", *other])
    assert config.model == ModelConfig(path="folder")
    assert config.data.files == compose(["data=csv", "data.path=somewhere"])[0].data.files


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("debug", "qwen3-0.5b-128k")])
def test_every_experiment_of_long_contexts_fits_its_gpus_and_gives_its_figures(name):
    config, _ = compose([f"experiment={name}", "data.path=somewhere", "model.dtype=bf16"])
    check_ranks(config, 8 if name.endswith("-8gpus") else 1)
    head = (CONFIGS / "experiment" / f"{name}.yaml").read_text().partition("defaults:")[0]
    assert f"experiment={name}" in head
    assert f"{config.data.sequence_length} packed tokens" in head
    assert re.search(r"^# (Measured|Never run\. Predicted) .*(GiB|GPU memory)", head, re.MULTILINE)


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_option_of_every_group_composes(group, name):
    missing = {"data": ["data.path=somewhere"], "model": ["model.path=somewhere"]} if name != "stdlib" else {}
    needed = missing.get(group, []) if name in ("text", "jsonl", "csv", "parquet", "chat", "pretrained") else []
    if name == "preferences":
        needed = ["data.path=somewhere", "model=pretrained", "model.path=somewhere", "model.lora.rank=4"]
    compose([f"{group}={name}", *needed, *["data.sources={a: {path: somewhere}}"] * (name == "mixture")])


@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_no_option_of_a_group_repeats_a_default(group, name):
    given = flat(OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{name}.yaml")), f"{group}.")
    defaults = flat(OmegaConf.to_container(OmegaConf.structured(_schema(Config))))
    assert [key for key, value in given.items() if key in defaults and value == defaults[key]] == []


def flat(settings, prefix=""):
    """The values below nested dictionaries, by dotted key."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_the_resolved_yaml_gives_the_same_configuration_again(tmp_path):
    config, resolved = compose(["optim.lr=1e-5"])
    (tmp_path / "train.yaml").write_text("defaults: [schema, _self_]\n" + resolved)
    assert compose([], folder=tmp_path)[0] == config


@pytest.mark.parametrize(("old", "new"), RENAMED.items(), ids=RENAMED)
def test_a_setting_of_an_earlier_version_is_refused_with_its_new_name(tmp_path, old, new):
    message = rf"^{old} is not a setting; did you mean {new}\?$"
    with pytest.raises(ConfigError, match=message):
        compose([f"{old}=1"])
    _, resolved = compose()
    settings = OmegaConf.create(resolved)
    OmegaConf.update(settings, old, 1)
    (tmp_path / "train.yaml").write_text("defaults: [schema, _self_]\n" + OmegaConf.to_yaml(settings))
    with pytest.raises(ConfigError, match=message):
        compose([], folder=tmp_path)


TYPED = {"True": "true", "False": "false", "None": "null"}


def test_help_lists_every_setting_with_its_default_type_and_sentence():
    text, defaults = settings_help(), OmegaConf.create(compose()[1])
    for key in settings_of(Config):
        default = OmegaConf.select(defaults, key)
        empty = "..." if default else "[]" if OmegaConf.is_list(default) else "{}"
        text_of = str(default).replace("\n", "\\n")
        shown = empty if OmegaConf.is_config(default) else TYPED.get(repr(default), text_of)
        head = re.search(rf"^  {re.escape(f'{key}={shown}')}  \((.+)\)\n      (\S.+)", text, re.MULTILINE)
        assert head, f"{key}={shown} is not in the help with a type and a sentence"


def test_help_lists_every_option_of_every_group():
    text = settings_help()
    for group, name in [*GROUPS, *(("experiment", name) for name in EXPERIMENTS)]:
        assert re.search(rf"^  {group}={re.escape(name)} +\w.+", text, re.MULTILINE), f"{group}={name}"


def test_help_of_the_parallel_group_says_context_parallel():
    assert re.search(r"^parallel: .*[Cc]ontext parallel", settings_help(), re.MULTILINE)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["optim.epochs=2"], None),
        (["optim.epochs=null"], 60),
        (["optim.epochs=2", "experiment=128k", "data.path=here"], None),
        (["optim.epochs=null", "optim.steps=90"], 90),
    ],
    ids=str,
)
def test_epochs_on_a_command_line_replace_the_steps_of_the_defaults(overrides, steps):
    assert compose(overrides)[0].optim.steps == steps


def test_dictionaries_of_the_data_take_any_key():
    config, _ = compose(["data=chat", "data.path=x", "data.chat_template_kwargs={enable_thinking: false}"])
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    evaluated = ["data=chat", "data.path=x", "data.held_out=0", "data.evaluation.path=y"]
    for variables in (".chat_template_kwargs={a: 1}", "={chat_template_kwargs: {a: 1}}"):
        config, _ = compose([*evaluated, f"data.evaluation{variables}"])
        assert config.data.evaluated().chat_template_kwargs == {"a": 1}
    config, _ = compose([*evaluated, "data.columns={input: c}", "data.evaluation.columns={output: d}"])
    assert (config.data.columns, config.data.evaluated().columns) == ({"input": "c"}, {"output": "d"})
    config, _ = compose(
        ["data=mixture", "data.sources={a: {path: x, files: ['*.py'], weight: 2}, b: {path: y, weight: 1}}"]
    )
    assert [part.files for part in config.data.parts().values()] == [["*.py"], config.data.files]


def settings_of(part, prefix=""):
    """The keys of all settings below a dataclass."""
    for name, kind in get_type_hints(part).items():
        yield from settings_of(kind, f"{prefix}{name}.") if is_dataclass(kind) else [prefix + name]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "optim.lrr is not a setting; did you mean optim.lr?"),
        (["+optim.foo=1"], "optim.foo is not a setting"),
        (["model.architecture.hiden_size=8"], "did you mean model.architecture.hidden_size?"),
        (["model.architecture.typo=8"], "model.architecture.typo is not a field of a llama configuration"),
        (["model.architecture.attention_bias=true"], "+model.architecture.attention_bias=... adds it"),
        (
            ["model=qwen3-0.5b", "model.architecture.rope_parameters.factor=2"],
            "+model.architecture.rope_parameters.factor",
        ),
        (["optim.lr=abc"], "optim.lr=abc must be a number"),
        (["optim.steps=0"], "optim.steps=0 must be 1 or more"),
        (["optim.steps=null"], "optim.steps=null needs optim.epochs"),
        (["optim.epochs=2", "optim.steps=9"], "optim.epochs=2.0 and optim.steps=9 exclude each other: set only one"),
        (["optim.epochs=0", "optim.steps=null"], "optim.epochs=0.0 must be more than 0"),
        (["optim.schedule=step"], "optim.schedule=step is not one of cosine, linear, constant, warmup_stable_decay"),
        (["optim.optimizer=lion"], "optim.optimizer=lion is not one of adamw, sgd"),
        (["optim.decay=0"], "optim.decay=0.0 must be a fraction of the steps"),
        (["optim.decay=0.1"], "optim.decay=0.1 has no effect with optim.schedule=cosine"),
        (["optim.schedule=warmup_stable_decay", "optim.decay=0.9"], "optim.decay=0.9 of optim.steps=60 overlap"),
        (
            ["optim.steps=3", "optim.warmup=4"],
            "optim.warmup=4 is more than optim.steps=3: the learning rate would never",
        ),
        (["optim.clip=-1"], "optim.clip=-1.0 must be 0 or more and finite"),
        (["optim.lr=nan"], "optim.lr=nan must be 0 or more and finite"),
        (["optim.beta1=2"], "optim.beta1=2.0 must be 0 or more and below 1"),
        (["optim.beta2=1"], "optim.beta2=1.0 must be 0 or more and below 1"),
        (["optim.eps=0"], "optim.eps=0.0 must be 1.18e-38 or more and at most 1"),
        (["optim.optimizer=sgd", "optim.eps=1e-6"], "optim.eps=1e-06 has no effect with optim.optimizer=sgd"),
        (["optim.optimizer=sgd", "memory.optimizer_states=host"], "memory.optimizer_states=host is for optim.optimiz"),
        (["parallel.transport=mpi"], "parallel.transport=mpi is not one of auto, nccl"),
        (["parallel.timeout_minutes=0"], "parallel.timeout_minutes=0 must be 1 or more"),
        (
            ["parallel.hop_timeout_seconds=58", "parallel.timeout_minutes=1"],
            "parallel.hop_timeout_seconds=58.0 must be at least 4 s less than parallel.timeout_minutes=1",
        ),
        (["parallel.hop_timeout_seconds=nan"], "parallel.hop_timeout_seconds=nan must be above 0 and finite"),
        (["experiment=foo"], "experiment=foo is not one of 128k, 128k-8gpus, 1m, 1m-8gpus, 256k"),
        (["model=foo"], "model=foo is not one of llama3-8b, pretrained, qwen3"),
        (["data=text"], "data.path is not set"),
        (["data=mixture"], "data.path is not set; add data.path=... to the command line, or data.sources"),
        (["data=mixture", "data.sources={a: {paht: x}}"], "data.sources.a.paht is not a setting"),
        (["data=mixture", "data.sources={a: {path: x, weight: y}}"], "data.sources.a.weight: Value 'y' of type"),
        (["data=mixture", "data.sources.a.path=x"], "data.sources is set as a whole, as in data.sources='{books:"),
        (["model.path=folder"], "model.path=folder and model.architecture"),
        (["model=pretrained"], "model.path is not set"),
        (["model.dtype=fp8"], "model.dtype=fp8 is not one of"),
        (["attention.kernel=hoper"], "attention.kernel=hoper is not one of auto, hopper, portable, blocked"),
        (["memory.zero=4"], "memory.zero=4 is not one of 0, 1, 2, 3"),
        (["memory.loss_tile=0"], "memory.loss_tile=0"),
        (["memory=recompute", "memory.mlp_tile=0"], "memory.mlp_tile=0 must be 1 or more"),
        (["memory.mlp_tile=64"], "memory.mlp_tile=64 needs memory.recompute=true"),
        (["memory.optimizer_states=fp8"], "memory.optimizer_states=fp8 is not one of fp32, bf16, host"),
        (["memory.zero=0", "memory.optimizer_states=host"], "memory.optimizer_states=host needs memory.zero=1, 2 or 3"),
        (["memory.zero=0", "memory.optimizer_states=bf16"], "memory.optimizer_states=bf16 needs memory.zero=1, 2 or 3"),
        (["memory=host", "memory.layer_inputs=disk"], "memory.layer_inputs=disk is not one of gpu, host"),
        (["memory.layer_inputs=host"], "memory.layer_inputs=host needs memory.recompute=true"),
        (["memory.attention_results=host"], "memory.attention_results=host needs memory.recompute=true"),
        (
            ["memory=host", "memory.layer_inputs=host:-1"],
            "memory.layer_inputs=host:-1 is not one of gpu, host, nor host:N",
        ),
        (
            ["memory=recompute", "memory.attention_results=gpu:3"],
            "memory.attention_results=gpu:3 is not one of gpu, host, re",
        ),
        (["parallel.layout=diagonal"], "parallel.layout=diagonal is not one of auto, contiguous, zigzag, striped"),
        (["parallel.intra_node_bandwidth_gb=0"], "parallel.intra_node_bandwidth_gb=0.0"),
        (["parallel.ulysses=null", "parallel.ring=2"], "parallel.ring=2 with parallel.ulysses=null"),
        (["parallel.ring=0"], "parallel.ring=0"),
        (["parallel.ulysses=0"], "parallel.ulysses=0"),
        (["logger.mode=loud"], "logger.mode=loud is not one of offline, online, disabled"),
        (["checkpoint.keep=0"], "checkpoint.keep=0"),
        (["evaluation.sequences=0"], "evaluation.sequences=0"),
        (["resume=maybe"], "resume=maybe is not one of never, auto"),
        (["name=../x"], "name='../x'"),
        (["optim"], "'optim' is not of the form key=value"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_refused_in_one_line_that_names_it(overrides, message):
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["parallel.ring=3"], 4, "parallel.ring=3 x parallel.ulysses=1 does not divide the 4 ranks"),
        (["parallel.ulysses=3"], 4, "parallel.ulysses=3 does not divide the 4 ranks"),
        (["data.sequence_length=15"], 8, "data.sequence_length=15 is smaller than 2 x 8 ranks"),
        (["optim.batch=3", "optim.micro_batch=2"], 1, "optim.batch=3 is not a multiple of 1 replicas x optim.micro"),
        (
            ["memory.zero=0", "model.dtype=bf16", "optim.batch=3"],
            1,
            "memory.zero=0 with bf16 weights would accumulate 3 micro-batches in bf16",
        ),
        (
            ["memory.optimizer_states=bf16", "model.dtype=bf16", "optim.batch=3"],
            1,
            "memory.optimizer_states=bf16 would accumulate 3 micro-batches in bf16",
        ),
        (
            ["memory.optimizer_states=bf16", "model.dtype=fp32"],
            1,
            "memory.optimizer_states=bf16 needs bf16 weights, and model.dtype=fp32 gives fp32 here",
        ),
        (
            ["memory=recompute", "memory.attention_results=recomputed"],
            2,
            "memory.attention_results=recomputed would run attention's exchanges again, between 2 ranks",
        ),
        (["optim.batch=1", "parallel.ring=2"], 4, "optim.batch=1 is not a multiple of 2 replicas"),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(overrides, ranks, message):
    with pytest.raises(ConfigError, match=message):
        check_ranks(compose(overrides)[0], ranks)
