"""python -m ringflash.generate: its settings, what it prints, several prompts on one document, ranks, and bad input."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

from ringflash import Loopback, ProcessRing
from ringflash.data.tokenizer import encoder
from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from ringflash.generate.__main__ import main
from ringflash.generate.answers import GenerateConfig, _graph, run
from ringflash.generate.turn import chat_turn
from ringflash.models import ModelConfig, read_config
from ringflash.models.lora import LoraConfig
from tests.data.chat_cases import LLAMA3, SMOLLM2, chat_tokenizer
from tests.pool import needs_gpus, own_device


class Alone(World):
    """A world of one rank, without a process group."""

    def broadcast(self, value):
        return value

    def max(self, x):
        return x

    def without_timeout(self, what):
        return contextlib.nullcontext()


ALONE = Alone(0, 1, torch.device("cpu"), None, ring=Loopback(1), ulysses=None, replica=0, replicas=1)


def write_model(folder, hidden_size):
    """A model of random weights with four heads, which continues in letters; returns the folder."""
    torch.manual_seed(3)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0, "max_position_embeddings": 2000}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=384, num_key_value_heads=2, **sizes, **tokens))
    with torch.no_grad():
        model.lm_head.weight[: 3 + ord("a")] = model.lm_head.weight[3 + ord("z") + 1 :] = 0.0  # letters stand out
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a small model, and a document."""
    folder = tmp_path_factory.mktemp("generate")
    write_model(folder / "model", hidden_size=32)
    (folder / "book.txt").write_text("It was a dark and stormy night. " * 20)
    return folder


def arguments(given, *more):
    return [f"model={given / 'model'}", f"document={given / 'book.txt'}", "tokenizer=bytes", "new_tokens=12", *more]


def answers(arguments, world=ALONE):
    """What is printed on standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run(GenerateConfig.parse(arguments), world)
    return out.getvalue(), err.getvalue()


def answers_on_a_process(arguments):
    rank, size, device = dist.get_rank(), dist.get_world_size(), own_device()
    return answers(arguments, World(rank, size, device, None, ProcessRing(device=device), None, 0, 1))


def test_two_prompts_read_the_document_once_and_report_times_and_memory(given):
    one, _ = answers(arguments(given, "prompt=Who?", "chunk=100"))
    both, report = answers(arguments(given, "prompt=Who?", "prompt=When?", "chunk=100"))
    assert both.startswith(one)
    assert len(both) > len(one) > 1
    read, *spoken = report.splitlines()
    assert re.fullmatch(
        r"ringflash: document: 640 tokens read in \S+ s \(\d+ tokens/s\); cache: 0.\d MiB, for 657 tokens", read
    )
    assert [bool(re.fullmatch(r"ringflash: 12 tokens in \S+ s \(\S+ tokens/s\)", x)) for x in spoken] == [True, True]


def test_ranks_give_one_ranks_answer_from_rank_0_alone(given, ranks):
    asked = arguments(given, "prompt=Who?", "temperature=1.5", "top_p=0.95", "seed=7", "chunk=100")
    alone, _ = answers(asked)
    (found, report), (silent, nothing) = ranks.run(answers_on_a_process, 2, asked)
    assert found == alone
    assert "MiB on each of 2 ranks" in report
    assert (silent, nothing) == ("", "")


def test_settings_of_generation_config_json_change_no_answer(given, tmp_path):
    shutil.copytree(given / "model", tmp_path / "model")
    published = {"do_sample": True, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 3}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(published))
    asked = arguments(given, "prompt=Who?")
    assert answers([f"model={tmp_path / 'model'}", *asked[1:]])[0] == answers(asked)[0]


@pytest.fixture
def adapter(given, tmp_path):
    """An adapter of the model, in its folder beside the model with the adapter merged, which peft wrote."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(given / "model")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    return tmp_path / "adapter"


def test_an_adapter_answers_as_the_model_that_peft_merges(given, adapter):
    asked = arguments(given, "prompt=Who?")[1:]
    expected = answers([*asked, f"model={adapter.parent / 'merged'}"])[0]
    assert answers([*asked, f"model={adapter}"])[0] == expected != answers([*asked, f"model={given / 'model'}"])[0]

    edit(adapter, base_model_name_or_path="org/model")
    for more, message in (
        ([], f"^model={adapter} is an adapter of base_model_name_or_path=org/model, .*: base=FOLDER names it; nothing"),
        ([f"base={adapter}"], f"^base={adapter} holds an adapter of peft"),
        (["base=org/model"], "^base=org/model is not a folder that exists"),
    ):
        with pytest.raises(ConfigError, match=message):
            answers([*asked, f"model={adapter}", *more])
    assert answers([*asked, f"model={adapter}", f"base={given / 'model'}"])[0] == expected
    with pytest.raises(ConfigError, match=rf"^base={adapter} is of an adapter, and model=.*/merged is none"):
        answers([*asked, f"model={adapter.parent / 'merged'}", f"base={adapter}"])
    edit(adapter, use_dora=True)
    with pytest.raises(ConfigError, match=rf"^model={adapter}: use_dora=True in adapter_config.json is not supported"):
        answers([*asked, f"model={adapter}", f"base={given / 'model'}"])


def edit(folder, file="adapter_config.json", **fields):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))


def test_an_adapter_has_the_rotary_positions_that_it_was_trained_with(given, adapter):
    asked = arguments(given, "prompt=Who?")[1:]
    before = answers([*asked, f"model={adapter}"])[0]
    rope = {"rope_type": "linear", "factor": 8.0}
    edit(adapter, rope_parameters=rope)
    edit(adapter.parent / "merged", "config.json", rope_parameters=rope | {"rope_theta": 10000.0})
    expected = answers([*asked, f"model={adapter.parent / 'merged'}"])[0]
    assert answers([*asked, f"model={adapter}"])[0] == expected != before
    lora = LoraConfig(path=str(adapter))
    with pytest.raises(ConfigError, match=r"was trained with model.rope_parameters={'rope_type': 'linear', .*alike$"):
        read_config(ModelConfig(path=str(given / "model"), lora=lora))
    read_config(ModelConfig(path=str(given / "model"), lora=lora, rope_parameters=rope))


def test_standard_input_is_a_document_or_prompts(given, monkeypatch):
    expected, _ = answers(arguments(given, "prompt=Who?", "prompt=When?"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Who?\n\nWhen?\n"))
    assert answers(arguments(given, "prompt=-"))[0] == expected
    text = io.BytesIO((given / "book.txt").read_bytes())
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=text))
    asked = [x for x in arguments(given, "prompt=Who?", "prompt=When?", "document=-") if "book" not in x]
    assert answers(asked)[0] == expected


def test_a_sampled_answer_follows_its_seed(given):
    asked = arguments(given, "prompt=Who?", "temperature=3.0")
    first, second, other = (answers([*asked, f"seed={seed}"])[0] for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_a_chat_turn_has_the_templates_tokens_and_spells_no_special_ones():
    for template in (SMOLLM2, LLAMA3):
        tokenizer = chat_tokenizer(template)
        encode = encoder(tokenizer, "m")
        before, after = chat_turn(tokenizer, "m", system=None)
        for document in ("It was dark.", "It said <|im_end|>."):
            ids = [*before, *encode.tokens(document), *encode.tokens("\n\nWho?"), *after]
            message = [{"role": "user", "content": f"{document}\n\nWho?"}]
            assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
            ends = [tokenizer.convert_tokens_to_ids(x) for x in ("<|im_end|>", "<|eot_id|>")]
            begin = tokenizer.decode(chat_turn(tokenizer, "m", system="Be kind.")[0])
            assert begin.startswith(
                tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}], tokenize=False)
            )
            system = template is SMOLLM2  # whose template begins with its own turn
            assert sum(ids.count(end) for end in ends) == 1 + system
    with pytest.raises(ConfigError, match="chat=true needs a chat template, and tokenizer=m has none"):
        chat_turn(chat_tokenizer(None), "m", system=None)


@pytest.fixture
def longrope(given, tmp_path):
    """The model with longrope of an original length, and positions that matter."""
    model = AutoModelForCausalLM.from_pretrained(given / "model")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 100

    def of(original):
        factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": original, **factors}
        model.config.rope_parameters = rope
        model.save_pretrained(tmp_path)
        return arguments(given, f"model={tmp_path}", "prompt=Who?")[1:]

    return of


def test_longrope_is_that_of_the_whole_text_and_refused_where_an_answer_passes_the_original_length(longrope):
    asked = longrope(600)
    printed = [answers([*asked, *more])[0] for more in ([], ["rope_length=2000"], ["rope_length=600"])]
    assert printed[0] == printed[1] != printed[2]
    crossing = r"rope_type=longrope depends .* grows from 644 to 656 tokens while a cache keeps its keys: rope_length=N"
    with pytest.raises(ConfigError, match=crossing):
        answers(longrope(650))
    with pytest.raises(ConfigError, match=r"^rope_length=0 must be 1 or more"):
        answers([*asked, "rope_length=0"])
    with pytest.raises(ConfigError, match=r"^rope_length=many must be a whole number"):
        GenerateConfig.parse(["model=m", "prompt=x", "rope_length=many"])


def test_help_names_every_setting(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    for name in GenerateConfig.__dataclass_fields__:
        assert re.search(rf"^  {name}\S* +\S", printed, re.MULTILINE), name


BAD = {
    "no model": (["prompt=x"], "model is not set"),
    "no prompt": (["model=m"], "prompt is not set"),
    "a misspelt setting": (["model=m", "promt=x"], r"promt=x is not a setting .* did you mean prompt"),
    "no setting": (["model=m", "--fast"], "--fast is not a setting of this command: these are model, base, tokenizer"),
    "twice": (["model=m", "prompt=x", "model=n"], "model is set more than once: model=m and model=n"),
    "a number": (["model=m", "prompt=x", "new_tokens=many"], "new_tokens=many must be a whole number"),
    "no token": (["model=m", "prompt=x", "new_tokens=0"], "new_tokens=0 must be 1 or more"),
    "temperature": (["model=m", "prompt=x", "temperature=-1"], "temperature=-1.0 must be 0"),
    "a seed": (["model=m", "prompt=x", f"seed={2**64}"], "seed=18446744073709551616 must be below 2"),
    "a system message alone": (
        ["model=m", "prompt=x", "system=s"],
        "system=s is a message of a conversation: set chat",
    ),
    "top_p": (["model=m", "prompt=x", "top_p=0"], "top_p=0.0 must be above 0"),
    "top_p alone": (["model=m", "prompt=x", "top_p=0.9"], "top_p=0.9 has no effect with temperature=0"),
    "graph": (["model=m", "prompt=x", "graph=yes"], "graph=yes is not one of auto, true, false"),
    "standard input twice": (["model=m", "prompt=-", "document=-"], "prompt=- reads standard input to its end"),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_named_in_one_line(given, message):
    with pytest.raises(ConfigError, match=message) as error:
        GenerateConfig.parse(given)
    assert "\n" not in str(error.value)


def test_bad_input_is_named_in_one_line(given, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "white.txt").write_text(" \n")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    book, model = given / "book.txt", given / "model"
    small = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
        eos_token_id=1, bos_token_id=2,
    ))  # fmt: skip
    small.save_pretrained(tmp_path / "small")
    large = AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0,
    ))  # fmt: skip
    torch.nn.init.zeros_(large.lm_head.weight[:384])
    large.save_pretrained(tmp_path / "large")
    asked = {"model": model, "document": book, "tokenizer": "bytes", "prompt": "x"}
    for change, message in (
        ({"document": tmp_path / "empty.txt"}, "document=.*empty.txt is empty"),
        ({"document": tmp_path / "white.txt"}, "document=.*white.txt holds white space alone"),
        ({"document": tmp_path / "none.txt"}, "document=.*none.txt cannot be read: No such file or directory"),
        ({"document": tmp_path}, "cannot be read: Is a directory"),
        ({"document": tmp_path / "image.png"}, r"image.png is not UTF-8: invalid start byte at byte 0 \(0x89\); iconv"),
        ({"model": tmp_path}, "^model=.* holds no config.json: it must be a Hugging Face model folder"),
        ({"tokenizer": tmp_path / "none"}, "^tokenizer=.*none is neither bytes nor a folder that exists"),
        ({"model": tmp_path / "none"}, "^model=.*none is not a folder that exists"),
        ({"dtype": "fp64"}, "^dtype=fp64 is not one of auto, bf16, fp32"),
        ({"tokenizer": model}, r"^tokenizer=.* holds no loadable tokenizer.*: \(1\) .*[^:]$"),
        ({"tokenizer": None}, "^model=.* holds no loadable tokenizer.*; tokenizer=FOLDER names another$"),
        ({"document": None, "prompt": ""}, '^prompt="" without a document leaves nothing to continue$'),
        ({"model": tmp_path / "small"}, "tokenizer=bytes does not fit model=.*: it has 384 tokens, .* vocab_size=300"),
        (
            {"model": tmp_path / "large"},
            r"tokenizer=bytes has 384 tokens, and model=.*large answers with token [3-5]\d\d: name",
        ),
        ({"kernel": "fast"}, "^kernel=fast is not one of auto, hopper"),
        ({"chunk": 2, "ring": Loopback(2)}, "^chunk must be 4 or more"),
        ({"graph": "true"}, "^graph=true needs a GPU, got device cpu; graph=auto decodes without one$"),
        ({"new_tokens": 1400}, "a document of 640 tokens, a prompt of 1 .* are 2041 positions, more than the 2000"),
        ({"new_tokens": 10**12, "extrapolate_positions": "true"}, r"need a cache of .* GiB on each rank, .* take more"),
    ):
        world = replace(ALONE, ring=change.pop("ring", Loopback(1)))
        config = GenerateConfig.parse(
            [f"{name}={value}" for name, value in (asked | change).items() if value is not None]
        )
        with pytest.raises(ConfigError, match=message) as error:
            run(config, world)
        assert "\n" not in str(error.value)


def test_a_line_of_standard_input_that_is_too_long_is_refused_with_its_memory(given, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a longer line\n"))
    with pytest.raises(ConfigError, match=r"a prompt of 13 tokens is longer than the 5 .* prompt_tokens=13, .* MiB"):
        answers(arguments(given, "prompt=-", "prompt_tokens=5"))


def test_several_gpus_decode_without_a_graph_and_say_why(capsys):
    gpu = torch.device("cuda", 0)
    world, cache = SimpleNamespace(device=gpu, is_first=True), SimpleNamespace(ring=SimpleNamespace(device=gpu, size=4))
    with _graph(GenerateConfig.parse(["model=m", "prompt=x"]), None, cache, world):
        pass
    why = "which needs one rank, got 4: the exchange of a layer is not part of a graph"
    assert capsys.readouterr().err == f"ringflash: decoding without a CUDA graph, {why}\n"
    with _graph(GenerateConfig.parse(["model=m", "prompt=x", "graph=false"]), None, cache, world):
        assert capsys.readouterr().err == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_one_gpu_answers_by_a_graph_unless_the_model_waits_for_it(given, tmp_path):
    gpu = replace(ALONE, device=torch.device("cuda", 0), ring=Loopback(1, "cuda:0"))
    asked = arguments(given, "prompt=Who?", "prompt=When?")
    _, report = answers(asked, gpu)  # heads of 8 are plain torch's, which waits
    assert report.count("decoding without a CUDA graph, which needs a model that never waits") == 1
    with pytest.raises(ConfigError, match="graph=true needs a model that never waits for the GPU"):
        answers([*asked, "graph=true"], gpu)
    asked = [f"model={write_model(tmp_path, hidden_size=128)}", *asked[1:]]
    found = [answers([*asked, f"graph={graph}"], gpu) for graph in ("auto", "false")]
    assert found[0][0] == found[1][0]
    assert "without a CUDA graph" not in found[0][1]


@pytest.mark.gpu
@needs_gpus
def test_two_gpus_give_one_gpus_answer(given, tmp_path, gpus):
    model = write_model(tmp_path, hidden_size=128)
    asked = [f"model={model}", *arguments(given, "prompt=Who?", "prompt=When?", "chunk=100")[1:]]
    ((alone, _),) = gpus.run(answers_on_a_process, 1, asked)
    (found, report), (silent, nothing) = gpus.run(answers_on_a_process, 2, asked)
    assert len(alone) > 20
    assert found == alone
    assert "MiB on each of 2 ranks" in report
    assert (silent, nothing) == ("", "")
