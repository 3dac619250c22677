"""Language-model pretraining of a small Mixture-of-Experts from scratch, on one or several corpora evenly.

Legend: T packed tokens, D model width, V vocabulary.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models.dataset import read_rows, split_rows
from models.decoder import MoEClassifier
from models.errors import CheckpointError, DataError
from models.packed import PackedBatch
from models.progress import Progress, silent
from models.tokenizer import TOKENIZER_FILE, TextEncoder
from models.training.augment import Ids, TokenSplitter, window
from models.training.config import SIZES, TrainConfig
from models.training.initial import base_model, initialize, new_config, save_base
from models.training.loop import Step, train, training_device
from models.training.losses import DomainLoss, RouterTap, balance_loss
from models.training.noise import Dropout
from models.training.tokenizer import BEGIN_ID, train_tokenizer


class LanguageModelling(nn.Module):
    """Next-token prediction; every corpus gives the same number of tokens per epoch, the size of their mean."""

    def __init__(
        self, model: MoEClassifier, corpora: Sequence[Sequence[Ids]], splitter: TokenSplitter, config: TrainConfig
    ) -> None:
        super().__init__()
        self.model = model
        self.head_VD = nn.Parameter(torch.empty(model.config.vocab_size, model.config.width))
        nn.init.normal_(self.head_VD, std=0.02, generator=torch.Generator().manual_seed(config.seed + 1))
        self.corpora = corpora
        self.splitter = splitter
        self.config = config
        self.corpus_of_text = [number for number, corpus in enumerate(corpora) for _ in corpus]
        shape = model.config
        self.domain_loss = DomainLoss(shape.num_layers, len(corpora), shape.layers[0].num_experts)

    def trained(self) -> nn.Module:
        """Everything that changes: body, language-model head, running use of experts; not the unused class head."""
        body = nn.Module()
        body.layers, body.domain_loss = self.model.layers, self.domain_loss
        body.embedding_VD, body.norm_D, body.head_VD = self.model.embedding_VD, self.model.norm_D, self.head_VD
        return body

    def epoch(self, generator: np.random.Generator) -> list[tuple[int, Ids]]:
        longest = self.config.max_tokens - 1
        budget = sum(min(len(ids), longest) for corpus in self.corpora for ids in corpus) / len(self.corpora)
        texts: list[tuple[int, Ids]] = []
        offset = 0
        for corpus in self.corpora:
            tokens = 0
            while tokens < budget:
                for index in generator.permutation(len(corpus)).tolist():
                    ids = window(corpus[index], longest, generator)
                    ids = self.splitter(ids, self.config.token_split * 2 * generator.random(), generator)
                    texts.append((offset + index, (BEGIN_ID, *ids[:longest])))
                    tokens += len(ids)
                    if tokens >= budget:
                        break
            offset += len(corpus)
        return texts

    def loss(self, step: Step) -> torch.Tensor:
        batch, tap = PackedBatch.pack(step.sequences, self.model.device), RouterTap()
        x_TD = self.model.hidden(batch, tap, noise=Dropout(batch, self.config.dropout, self.config.path_dropout))
        has_next_T = torch.ones(batch.num_tokens, dtype=torch.bool, device=self.model.device)
        has_next_T[batch.last_B] = False
        position_N = torch.nonzero(has_next_T).squeeze(1)
        loss = F.cross_entropy(F.linear(x_TD[position_N], self.head_VD), batch.ids_T[position_N + 1])
        if self.config.balance_loss:
            loss = loss + self.config.balance_loss * balance_loss(tap)
        if self.config.domain_loss:
            corpus_B = torch.tensor([self.corpus_of_text[row] for row in step.rows])
            corpus_T = corpus_B.repeat_interleave(torch.tensor(batch.lengths)).to(self.model.device)
            loss = loss + self.config.domain_loss * self.domain_loss(tap, corpus_T)
        return loss


def pretrain(
    data: Sequence[Path],
    out: Path,
    config: TrainConfig,
    family: str = "qwen3_moe",
    size: str = "demo",
    tokenizer: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Train a tokenizer (unless one is given) and a language model on the train rows' texts; write a base to `out`.

    The base is a Hugging Face causal language model directory. Saved steps lie in `<out>.training` until the end.
    Raises ConfigError, DataError, or CheckpointError if `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already: choose another --out or remove it")
    raw = new_config(family, size, SIZES[size].vocab_size if size in SIZES else 0, max_tokens=512)
    corpora_rows = [split_rows(read_rows(file), config.seed)[0] for file in data]
    for file, rows in zip(data, corpora_rows, strict=True):
        if any(row.image is not None for row in rows):
            raise DataError(f"{file.name}: rows are images, {family} reads texts: choose the family vmoe")
    texts = [[row.text for row in rows] for rows in corpora_rows]
    with tempfile.TemporaryDirectory() as scratch:
        file = tokenizer or Path(scratch) / TOKENIZER_FILE
        if tokenizer is None:
            progress(0, 1000, "training the tokenizer")
            train_tokenizer(texts, raw["vocab_size"], file)
        model = base_model(raw)
        initialize(model, config.seed)
        encoder = TextEncoder(file, model.config.max_tokens, model.config.vocab_size)
        corpora = [[ids for text in corpus if (ids := encoder.encode(text).ids)] for corpus in texts]
        if not all(corpora):
            raise DataError(f"{data[corpora.index([])].name}: the tokenizer finds no token in any of its texts")
        objective = LanguageModelling(model, corpora, TokenSplitter(file), config).to(training_device())
        state = out.with_name(f"{out.name}.training")
        train(objective.trained(), objective, config, state, f"pretraining {out.name}", progress)
        save_base(out, model, objective.head_VD, raw, file)
        shutil.rmtree(state, ignore_errors=True)
