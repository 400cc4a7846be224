"""Tokenizers: text to tokens, where no text becomes a special token, and one end of document follows each text.

A tokenizer takes text that spells a special token (`</s>` in an HTML page) for the token itself, in two places. It
looks for its special tokens before anything else, and its model may hold them as ordinary pieces (Unigram, WordLevel,
WordPiece, and BPE with `ignore_merges`). So text is encoded by a copy of the tokenizer in which the special tokens have
names that no text spells; their numbers stay.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from ringflash.data.pieces import Ids, Piece
from ringflash.errors import ConfigError, hub_hint, reason

UNSPELLABLE = "\U0010fffe"  # a noncharacter: Unicode reserves it for use inside a program


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Texts to documents. ids: texts to ids, with nothing added. begin, end: ids added to each document, eos last."""

    ids: Ids
    begin: list[int]
    end: list[int]

    def __call__(self, parts: Sequence[Piece]) -> list[np.ndarray]:
        """The tokens of each piece, with `begin` and `end` where its text begins and ends."""
        found = self.ids([piece.text for piece in parts])
        begin, end, nothing = (np.array(ids, np.int64) for ids in (self.begin, self.end, []))
        return [
            np.concatenate([begin if piece.first else nothing, ids[piece.skipped :], end if piece.last else nothing])
            for piece, ids in zip(parts, found, strict=True)
        ]

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, nothing added."""
        return self.ids([text])[0].tolist()


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer called "bytes", or that of a folder. Raises ConfigError if there is none, or if it has no eos."""
    if name == "bytes":
        return ByT5Tokenizer()
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        raise ConfigError(f"data.tokenizer={name} is neither bytes nor a folder that exists{hub_hint(name)}")
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


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase, chat: bool) -> str:
    """A digest of everything that determines the tokens of a text or of a conversation."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    made_of = [type(tokenizer).__name__, rules, tokenizer.eos_token, sorted(tokenizer.get_vocab().items())]
    made_of += [tokenizer.chat_template, tokenizer.special_tokens_map] if chat else []
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ConfigError for a tokenizer that may give ids which a model of `vocab_size` tokens does not have."""
    if (size := tokenizer_size(tokenizer)) > vocab_size:
        raise ConfigError(
            f"data.tokenizer={name} has {size} tokens, more than the model's model.architecture.vocab_size={vocab_size}"
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What finds the special tokens that a text spells, apart from single characters."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelled = [re.escape(token) for token in special if len(token) > 1]
    return re.compile("|".join(sorted(spelled, key=len, reverse=True)) or r"(?!)")


def encoder(tokenizer: PreTrainedTokenizerBase, name: str) -> Encoder:
    """The encoder of documents. It also adds the tokens that the tokenizer adds around a text, such as a bos.

    Raises ConfigError, naming the tokenizer, if its end of document is ordinary text.
    """
    eos = cast(int, tokenizer.eos_token_id)
    if isinstance(tokenizer, ByT5Tokenizer):
        return Encoder(functools.partial(_encode_bytes, np.uint16(tokenizer.offset)), [], [eos])
    if tokenizer.is_fast:
        backend = text_only(tokenizer, name)
        begin, end = _added_tokens(backend)
        ids = functools.partial(_encode_fast, backend, tokenizer, name)
    else:
        whole = tokenizer.build_inputs_with_special_tokens([eos + 1])
        place = whole.index(eos + 1)
        begin, end = whole[:place], whole[place + 1 :]
        ids = functools.partial(_encode_slow, tokenizer, name)
    return Encoder(ids, begin, end if end[-1:] == [eos] else [*end, eos])


def _encode_bytes(offset: np.uint16, texts: list[str]) -> list[np.ndarray]:
    """ByT5's ids: its own loop over characters does 2 MB/s, and takes "</s>" for its eos."""
    return [np.frombuffer(text.encode(), np.uint8) + offset for text in texts]


def _encode_fast(backend: Tokenizer, tokenizer: Any, name: str, texts: list[str]) -> list[np.ndarray]:
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # tokenizers raises a bare Exception, such as for an unknown word without an unk_token
        raise ConfigError(f"data.tokenizer={name} cannot encode the text of data.path: {reason(error)}") from error
    found = [uint32_array(encoding.ids) for encoding in encodings]
    if any((ids == tokenizer.eos_token_id).any() for ids in found):
        raise ConfigError(
            f"data.tokenizer={name} makes its eos_token={tokenizer.eos_token} of ordinary text, so a document "
            f"would end early: give the tokenizer an eos_token that is not its unk_token"
        )
    return found


def uint32_array(numbers: list[int]) -> np.ndarray:
    """The numbers as an array of uint32, in half the time of np.array."""
    return np.frombuffer(array("I", numbers), np.uintc)


def _added_tokens(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """The tokens that a fast tokenizer adds before and after a text."""
    for text in itertools.chain("a", (backend.decode([number]) for number in range(backend.get_vocab_size()))):
        try:
            plain, whole = (backend.encode(text, add_special_tokens=added).ids for added in (False, True))
        except Exception:  # a bare one, for a word that the tokenizer does not know
            continue
        if plain:
            begin = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
            return whole[:begin], whole[begin + len(plain) :]
    return [], []


def _encode_slow(tokenizer: Any, name: str, texts: list[str]) -> list[np.ndarray]:
    found = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        if tokenizer.eos_token_id in ids:
            raise ConfigError(
                f"data.tokenizer={name}: {type(tokenizer).__name__} makes its eos_token={tokenizer.eos_token} of text "
                f"that spells it, so a document would end early; give a tokenizer with a tokenizer.json"
            )
        found.append(np.array(ids, np.int64))
    return found


def text_only(tokenizer: Any, name: str) -> Tokenizer:
    """A copy of a fast tokenizer's backend in which no text spells a special token.

    Raises ConfigError, naming the tokenizer, if its end of document is a character.
    """
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
