"""Tokenizers: text to tokens, where no text becomes a special token, and one end of document follows each text.

A tokenizer takes text that spells a special token (`</s>` in an HTML page) for the token itself, in two places. It
looks for its special tokens before anything else, and its model may hold them as ordinary pieces (Unigram, WordLevel,
WordPiece, and BPE with `ignore_merges`). So text is encoded by a copy of the tokenizer in which the special tokens have
names that no text spells; their numbers stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ringflash.errors import ConfigError, reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from ringflash.data.documents import DataConfig

UNSPELLABLE = "\U0010fffe"  # a noncharacter: Unicode reserves it for use inside a program

Encoder = Callable[[list[str]], list[np.ndarray]]  # texts to tokens of one document each, with its end


def load_tokenizer(config: DataConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.tokenizer`. Raises ConfigError if its folder is missing or holds none with an end."""
    from transformers import AutoTokenizer, ByT5Tokenizer  # slow to import, so only where text is tokenised

    name = config.tokenizer
    if name == "bytes":
        return ByT5Tokenizer()
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        raise ConfigError(f"data.tokenizer={name} is neither bytes nor a folder that exists")
    try:
        # trust_remote_code=None would ask at the terminal
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and tokenizers' bare Exception
        raise ConfigError(
            f"data.tokenizer={name} holds no loadable tokenizer, such as a tokenizer.json with its "
            f"tokenizer_config.json: {reason(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"data.tokenizer={name} has no eos_token, which must end each document: name one in its "
            f"tokenizer_config.json"
        )
    return tokenizer


def tokenizer_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id that a tokenizer may give, plus 1."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def check_vocabulary(config: DataConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ConfigError for a tokenizer that may give ids which a model of `vocab_size` tokens does not have."""
    if (size := tokenizer_size(tokenizer)) > vocab_size:
        raise ConfigError(
            f"data.tokenizer={config.tokenizer} has {size} tokens, more than the model's "
            f"model.architecture.vocab_size={vocab_size}"
        )


def encoder(tokenizer: PreTrainedTokenizerBase, name: str) -> Encoder:
    """The function that encodes documents. What the tokenizer adds at their begin, such as a bos, it adds.

    Raises ConfigError, by name, for a tokenizer whose end of document is ordinary text.
    """
    from transformers import ByT5Tokenizer

    if isinstance(tokenizer, ByT5Tokenizer):
        return lambda texts: _bytes(tokenizer, texts)
    if not tokenizer.is_fast:
        return lambda texts: _slow(tokenizer, name, texts)
    backend = text_only(tokenizer, name)
    return lambda texts: _fast(backend, tokenizer, name, texts)


def _bytes(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """ByT5's tokens: its own loop over characters does 2 MB/s, and takes "</s>" for its eos."""
    ends = np.array([tokenizer.eos_token_id], np.uint16)
    offset = np.uint16(tokenizer.offset)
    return [np.concatenate([np.frombuffer(text.encode(), np.uint8) + offset, ends]) for text in texts]


def _fast(backend: Tokenizer, tokenizer: Any, name: str, texts: list[str]) -> list[np.ndarray]:
    eos = tokenizer.eos_token_id
    try:
        encodings = backend.encode_batch_fast(texts)
    except Exception as error:  # tokenizers raises a bare Exception, such as for an unknown word without an unk_token
        raise ConfigError(f"data.tokenizer={name} cannot encode the text of data.path: {reason(error)}") from error
    documents = []
    for encoding in encodings:
        ids = encoding.ids
        count = ids.count(eos)
        added = count and sum(id == eos for id, one in zip(ids, encoding.special_tokens_mask, strict=True) if one)
        if count > added:
            raise ConfigError(
                f"data.tokenizer={name} makes its eos_token={tokenizer.eos_token} of ordinary text, so a document "
                f"would end early: give the tokenizer an eos_token that is not its unk_token"
            )
        ended = bool(ids) and ids[-1] == eos  # by the tokenizer itself
        documents.append(np.asarray(ids if ended else [*ids, eos], np.int64))
    return documents


def _slow(tokenizer: Any, name: str, texts: list[str]) -> list[np.ndarray]:
    eos = tokenizer.eos_token_id
    adds_end = tokenizer.build_inputs_with_special_tokens([eos + 1])[-1] == eos
    documents = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if eos in ids:
            raise ConfigError(
                f"data.tokenizer={name}: {type(tokenizer).__name__} makes its eos_token={tokenizer.eos_token} of text "
                f"that spells it, so a document would end early; give a tokenizer with a tokenizer.json"
            )
        whole = tokenizer.build_inputs_with_special_tokens(ids)
        documents.append(np.asarray(whole if adds_end else [*whole, eos], np.int64))
    return documents


def text_only(tokenizer: Any, name: str) -> Tokenizer:
    """A copy of a fast tokenizer's backend whose special tokens no text spells."""
    from tokenizers import Tokenizer

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    model = rules["model"]
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    pieces = dict(model["vocab"])
    characters = {token for token in special if len(token) == 1 and token in pieces}  # without them, text would be lost
    if tokenizer.eos_token in characters:
        raise ConfigError(
            f"data.tokenizer={name} has eos_token={tokenizer.eos_token!r}, which is ordinary text of its vocabulary: "
            f"the end of a document would look like text; give the tokenizer an eos_token that is no text"
        )
    names = {token: UNSPELLABLE + token for token in special - characters}
    _rename(model, names)
    for added in rules["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    backend = Tokenizer.from_str(json.dumps(rules))
    backend.encode_special_tokens = True  # for special tokens that are characters, such as a pad_token "!"
    backend.no_truncation()
    backend.no_padding()
    return backend


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Gives pieces of a model's vocabulary other names, and removes the merges that would make them or use them."""
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint([*pair, "".join(pair)])]
