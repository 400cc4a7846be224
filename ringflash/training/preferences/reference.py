"""The log-probabilities of answers by the reference, which are computed before training and kept in the data's cache.

    <data.cache>/<key>.reference.npz    pairs uint8 [pairs, 16]: the digest of each pair's tokens and labels
                                        values float64 [pairs, 2]: log p of its answers, the chosen one first

The key covers everything else that decides these numbers: the bytes of the weights, their dtype and RoPE. Numbers of
other weights or of other data are therefore never found, however pairs are packed, mixed or repeated, and on any
number of ranks. Runs of other settings share the file.
"""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ringflash.data.pairs import DIGEST
from ringflash.errors import reason
from ringflash.files import CONFIG, digest, weight_files, write_atomically
from ringflash.models import ModelConfig
from ringflash.models.configuration import DTYPES
from ringflash.models.lora import CONFIG as ADAPTER_CONFIG

FORMAT = 1  # of the file; increase it when the same pair gives other numbers


LogProbabilities = dict[bytes, list[float]]  # log p of the chosen and of the rejected answer, by the pair's digest


def reference_path(cache: str, model: ModelConfig) -> Path:
    """The file of the model that training starts from. This reads all of its weights."""
    folders = [path for path in (model.path, model.lora.path) if path is not None]
    made_of = [FORMAT, str(DTYPES[model.dtype]), model.lora.quantize_base, model.rope_parameters, model.rope_length]
    made_of += [] if model.linear_dtype is None else [model.linear_dtype]
    made_of += [_weights_digest(Path(folder)) for folder in folders]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    return Path(cache).expanduser() / f"{key}.reference.npz"


def _weights_digest(folder: Path) -> list[str]:
    """The names and digests of the configuration and of the weight files of a model or an adapter."""
    files = [file for name in (CONFIG, ADAPTER_CONFIG) if (file := folder / name).exists()] + weight_files(folder)
    with ThreadPoolExecutor(8) as threads:  # hashing leaves Python's lock
        return [f"{file.name} {found}" for file, found in zip(files, threads.map(digest, files), strict=True)]


def read(path: Path) -> LogProbabilities:
    """The numbers in a file; none if there is no file, or if it is damaged, which is reported."""
    if not path.exists():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:  # which compares checksums
            pairs, values = file["pairs"], file["values"]
        return dict(zip(map(bytes, pairs), values.tolist(), strict=True))
    except Exception as error:  # numpy and zipfile raise errors of any kind
        print(f"{path} cannot be read ({reason(error)}): its log-probabilities are computed again", flush=True)
        return {}


def write(path: Path, known: LogProbabilities) -> None:
    """Replace the file by one of these numbers."""
    pairs = np.frombuffer(b"".join(known), np.uint8).reshape(-1, DIGEST)
    content = io.BytesIO()
    np.savez(content, pairs=pairs, values=np.array([*known.values()], np.float64))
    write_atomically(path, content.getvalue())
