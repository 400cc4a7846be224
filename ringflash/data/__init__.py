"""Documents to batches: text is tokenised once, packed by a pure function of (seed, step), and sharded over ranks.

text, JSON, CSV, parquet  --documents.py-->  tokens.npy, labels.npy  --corpus.py-->  train and held-out TokenCorpus
                                                                                        |  packing.py
a rank's Shard  <--Batch.shard(layout, rank)--  Batch [B, S]  <--batches.py--  packed sequences of S tokens
"""

from ringflash.data.batches import Batch, batch, stream
from ringflash.data.corpus import TokenCorpus, load_corpus
from ringflash.data.documents import DataConfig, python_stdlib, tokenised
from ringflash.data.packing import Packed, pack, sequences_per_epoch, summary
from ringflash.data.records import IGNORE
from ringflash.data.tokenizer import check_vocabulary, load_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "DataConfig",
    "Packed",
    "TokenCorpus",
    "batch",
    "check_vocabulary",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "python_stdlib",
    "sequences_per_epoch",
    "stream",
    "summary",
    "tokenised",
]
