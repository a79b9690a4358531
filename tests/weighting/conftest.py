"""A small causal language model of one's own, in plain PyTorch, and its data."""

import pytest
import torch
from composer.models import ComposerModel
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

WORDS, LENGTH, SAMPLES = 11, 7, 36


class Sentences(Dataset):
    """36 sequences that count upwards with errors, of 4 to 7 tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.arange(SAMPLES)[:, None] + torch.arange(LENGTH)
        errors = torch.randint(WORDS, (SAMPLES, LENGTH), generator=generator)
        self.tokens = torch.where(torch.rand(SAMPLES, LENGTH, generator=generator) < 0.3, errors, numbers) % WORDS
        self.labels = self.tokens.masked_fill(torch.arange(LENGTH) >= 4 + torch.arange(SAMPLES)[:, None] % 4, -100)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {'input_ids': self.tokens[index], 'labels': self.labels[index]}


def net() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, 8), nn.Tanh(), nn.Linear(8, WORDS))


def shifted(logits: torch.Tensor, labels: torch.Tensor, **options) -> torch.Tensor:
    """The mean over all tokens that have a label."""
    return cross_entropy(logits[:, :-1].reshape(-1, WORDS), labels[:, 1:].reshape(-1), **options)


class Language(ComposerModel):
    """Its loss is ``function(logits, labels)``."""

    def __init__(self, function=shifted) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.function = net(), function

    def forward(self, batch):
        return self.net(batch['input_ids'])

    def loss(self, outputs, batch):
        return self.function(outputs, batch['labels'])


@pytest.fixture
def sentences() -> Sentences:
    return Sentences()
