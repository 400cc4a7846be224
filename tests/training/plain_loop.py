"""Steps of a plain loop on a model of transformers, which shares nothing with the trainer but the order of the data."""

import torch
from torch import nn

from ringflash.data import batch, load_corpus


def plain_steps(model, config, embedded=None):
    """(loss, gradient norm) of each step of a run's settings; each document alone. Trains what needs a gradient.

    embedded: the embeddings [S, H] of a document's tokens, by them, their sequence's number and their first position.
    """
    optim, figures = config.optim, []
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if (p.dim() > 1) == decays], "weight_decay": optim.weight_decay * decays}
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    corpus, _ = load_corpus(config.data)
    for step in range(optim.steps):
        rows = batch(
            corpus, seed=config.data.seed, step=step, batch_size=optim.batch, length=config.data.sequence_length
        )
        total = torch.zeros(())
        for row, (tokens, labels, lengths) in enumerate(zip(rows.tokens, rows.labels, rows.documents, strict=True)):
            begin = 0
            for piece, target in zip(tokens.split(lengths), labels.split(lengths), strict=True):
                inputs = {"input_ids": piece[None]}
                if embedded is not None:
                    inputs = {"inputs_embeds": embedded(piece, step * optim.batch + row, begin)[None]}
                begin += len(piece)
                logits = model(**inputs).logits[0]
                total = total + nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        loss = total / (rows.labels != -100).sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, optim.clip)
        for group in adamw.param_groups:
            group["lr"] = optim.learning_rate(step + 1)
        adamw.step()
        adamw.zero_grad()
        figures.append((loss.item(), norm.item()))
    return figures
