"""Documents to batches: text is tokenised once, packed by a pure function of (seed, step), and sharded over ranks.

text, JSON, CSV, parquet  --documents.py-->  tokens.npy, labels.npy  --corpus.py-->  train and held-out TokenCorpus
                                                                        several: mixture.py, one by one: streamed.py
                                                                                        |  packing.py
a rank's inputs  <--training/step.py--  Batch [B, S]  <--batches.py--  packed sequences of S tokens

    config                      the settings
    files, text, formats        the files of a path, their text, and the records in it
    card                        the configurations of a data set of the hub
    records, chat, preferences  what a record means: text, token ids, a conversation or a pair of answers, as documents
    messages                    the messages of a record in the form that chat templates expect
    tokenizer, pieces           text to tokens, a long text in pieces
    documents, build            tokenise once, by one process per core, and continue a build that was stopped
    cache, scratch              the tokens on disk, complete or absent
    split, corpus               the training and the held-out documents
    packing, best_fit           documents to sequences of equal length
    pairs                       pairs of documents in a packed sequence
    mixture, streamed           several sources; files that are tokenised during training
    batches                     the sequences of a step
"""

from ringflash.data.batches import Batch, batch, prefetch, stream
from ringflash.data.config import DataConfig
from ringflash.data.corpus import Corpus, Evaluated, TokenCorpus, load_corpus
from ringflash.data.documents import python_stdlib, tokenised
from ringflash.data.mixture import Mixture, load_corpora
from ringflash.data.packing import Packed, pack
from ringflash.data.records import IGNORE
from ringflash.data.tokenizer import check_vocabulary, load_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "Corpus",
    "DataConfig",
    "Evaluated",
    "Mixture",
    "Packed",
    "TokenCorpus",
    "batch",
    "check_vocabulary",
    "load_corpora",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "prefetch",
    "python_stdlib",
    "stream",
    "tokenised",
]
