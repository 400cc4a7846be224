"""What does not fit a pretrained model, such as another end of a text or other ids, is reported in one line each."""

import json

import pytest
from transformers import LlamaConfig

from ringflash.training.compose import compose
from ringflash.training.mismatches import mismatches
from ringflash.training.preflight import check_inputs
from tests.data.cases import write_texts, write_tokenizer
from tests.data.chat_cases import LLAMA3, SMOLLM2, chat, chat_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def reported(tmp_path):
    """The lines for a model of a vocabulary and an end, and for the words of its tokenizer and of another."""
    text = write_texts(tmp_path / "text")

    def lines(eos, words=("one", "two"), own=("one", "two"), generation=None, vocab_size=8, more=("optim=adamw",)):
        tokenizer = write_tokenizer(tmp_path / "tokenizer", words=words)
        model = write_tokenizer(tmp_path / "model", words=own) if own else tmp_path / "model"
        LlamaConfig(vocab_size=vocab_size, eos_token_id=eos, **SHAPE).save_pretrained(model)
        if generation is not None:
            (model / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        settings = [f"model.path={model}", f"data.path={text}", f"data.tokenizer={tokenizer}"]
        config, _ = compose(["model=pretrained", "data=text", "data.sequence_length=64", *settings, *more])
        return [line.replace(str(tmp_path), "") for line in mismatches(config, *check_inputs(config))]

    return lines


def test_those_that_agree_are_not_reported(reported):
    assert reported(1) == reported([0, 1]) == reported(None) == reported(0, generation=[0, 1]) == []
    assert reported(1, own=None, vocab_size=1000) == []


def test_files_that_are_evaluated_and_trained_on_are_counted(reported, tmp_path):
    other, evaluated = write_texts(tmp_path / "other", ["a"]), ["optim=adamw", "data.held_out=0"]
    assert reported(1, more=[*evaluated, f"data.evaluation.path={other}"]) == []
    (other / "link.txt").symlink_to(tmp_path / "text" / "000.txt")
    [line] = reported(1, more=[*evaluated, f"data.evaluation.path={other}"])
    assert line == "evaluation data.evaluation.path=/other has 2 files, of which 1 are trained on, too"


def test_another_end_is_reported_with_both_ids(reported):
    [line] = reported(0, generation=[2])
    assert line == (
        "tokenizer  data.tokenizer=/tokenizer ends documents with <eos> (id 1), but model.path=/model stops at id 0 or "
        "2: set eos_token_id there to stop at both"
    )


@pytest.mark.parametrize(("template", "end"), [(SMOLLM2, "<|im_end|>"), (LLAMA3, "<|eot_id|>")])
def test_an_end_of_answers_at_which_the_model_does_not_stop_is_reported(tmp_path, template, end):
    tokenizer, folder = chat_tokenizer(template), tmp_path / "model"
    tokenizer.save_pretrained(folder)
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"messages": chat("hi", "hello")}) + "\n")
    settings = [
        "data=chat",
        f"data.path={data}",
        f"data.tokenizer={folder}",
        "model=pretrained",
        f"model.path={folder}",
    ]

    def lines(stops):
        LlamaConfig(vocab_size=len(tokenizer), eos_token_id=stops, **SHAPE).save_pretrained(folder)
        config, _ = compose([*settings, "data.sequence_length=64", "optim=adamw"])
        return mismatches(config, *check_inputs(config))

    assert lines([eos, turn]) == []
    [line] = lines(eos)
    assert f"ends answers with {end} (id {turn}), but model.path={folder} stops at id {eos}: add it to eos" in line


def test_other_ids_are_reported_with_their_number(reported):
    [line] = reported(1, words=("two", "one", "three"))
    assert line == (
        "tokenizer  data.tokenizer=/tokenizer has 3 of 5 tokens with other ids than the tokenizer in model.path="
        "/model: data.tokenizer=/model takes that one"
    )


def test_a_learning_rate_that_would_undo_pretraining_is_reported(reported):
    [line] = reported(1, more=())  # optim=demo
    assert line == (
        "optim      optim.lr=0.003 is high for the pretrained weights of model.path=/model: full fine-tuning usually "
        "takes 1e-6 to 1e-4"
    )
    assert reported(1, more=["optim.lr=1e-4"]) == reported(1, more=["optim.optimizer=sgd"]) == []


def test_a_vocabulary_that_is_mostly_unused_is_reported_where_the_model_has_no_tokenizer(reported):
    [line] = reported(1, own=None, vocab_size=32000)
    assert line == "tokenizer  data.tokenizer=/tokenizer has 4 tokens, but model.path=/model 32,000: is it its own?"
