"""Warnings about settings that do not match: a pretrained model with another end of texts or answers, vocabulary or
learning rate, and text to evaluate on that is trained on too.

These settings are not refused, since a model may be given new tokens, another end or a high learning rate. Ids that the
model does not have are refused by `check_vocabulary`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ringflash.data import DataConfig, load_tokenizer
from ringflash.data.documents import find_files
from ringflash.data.tokenizer import tokenizer_size
from ringflash.errors import ConfigError
from ringflash.training.config import Config
from ringflash.training.export import generation_file

HIGH = 1e-3  # a learning rate that soon undoes pretraining, where all weights are trained
SPARE = 1024  # rows of a vocabulary that is padded to a round number


def mismatches(config: Config, model: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One line each for evaluated files that are trained on, for a high learning rate, and for an end of texts or
    answers or a vocabulary that differs from model.path's."""
    path, name, lr = config.model.path, config.data.tokenizer, config.optim.lr
    lines = _evaluated_and_trained(config.data)
    if not path:
        return lines
    if lr > HIGH and not config.model.lora.enabled and config.optim.optimizer == "adamw":
        lines.append(
            f"optim      optim.lr={lr} is high for the pretrained weights of model.path={path}: full fine-tuning "
            f"usually takes 1e-6 to 1e-4"
        )
    ends = sorted({*_ends(vars(model)), *_ends(_generation(path))})
    if ends and tokenizer.eos_token_id not in ends:
        lines.append(
            f"tokenizer  data.tokenizer={name} ends documents with {tokenizer.eos_token} (id "
            f"{tokenizer.eos_token_id}), but model.path={path} stops at id "
            f"{' or '.join(map(str, ends))}: set eos_token_id there to stop at both"
        )
    chats = any(part.chat for part in config.data.parts().values())
    if ends and chats and (end := end_of_answer(tokenizer)) is not None and end not in ends:
        lines.append(
            f"tokenizer  the chat template of data.tokenizer={name} ends answers with "
            f"{tokenizer.convert_ids_to_tokens(end)} (id {end}), but model.path={path} stops at id "
            f"{' or '.join(map(str, ends))}: add it to eos_token_id in its generation_config.json"
        )
    return lines + [f"tokenizer  {line}" for line in _vocabularies(config, model.vocab_size, tokenizer)]


def end_of_answer(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The last special token of a rendered conversation, at which generating should stop; None if there is none."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # of the template, which the first record reports
        return None
    ids = tokenizer(text[text.rindex("Hello") :], add_special_tokens=False)["input_ids"] if "Hello" in text else []
    return next((one for one in reversed(ids) if one in tokenizer.all_special_ids), None)


def _evaluated_and_trained(data: DataConfig) -> list[str]:
    evaluated = data.evaluated()
    if evaluated is None:
        return []
    trained = {file.resolve() for part in data.parts().values() for file, _ in find_files(part)[0]}
    files = [file for file, _ in find_files(evaluated)[0]]
    both = sum(file.resolve() in trained for file in files)
    note = f"data.evaluation.path={evaluated.path} has {len(files):,} files, of which {both:,} are trained on, too"
    return [f"evaluation {note}"] * (both > 0)


def _vocabularies(config: Config, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    path, name = str(config.model.path), config.data.tokenizer
    if os.path.realpath(os.path.expanduser(name)) == os.path.realpath(path):
        return
    try:
        own = load_tokenizer(path).get_vocab()
    except ConfigError:  # a folder of weights alone
        size = tokenizer_size(tokenizer)
        if vocab_size - size > SPARE:
            yield f"data.tokenizer={name} has {size:,} tokens, but model.path={path} {vocab_size:,}: is it its own?"
        return
    given = tokenizer.get_vocab()
    other = sum(own.get(token) != number for token, number in given.items())
    if other:
        yield (
            f"data.tokenizer={name} has {other:,} of {len(given):,} tokens with other ids than the tokenizer in "
            f"model.path={path}: data.tokenizer={path} takes that one"
        )


def _generation(path: str) -> dict[str, Any]:
    try:
        found = json.loads(generation_file(path) or b"{}")
    except ValueError:  # refused by the export's rehearsal
        return {}
    return found if isinstance(found, dict) else {}


def _ends(settings: dict[str, Any]) -> list[int]:
    """The ids that end a text: one, several or none."""
    found = settings.get("eos_token_id")
    return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)]
