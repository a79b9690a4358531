"""Language models through Composer's HuggingFaceModel: dict batches, padding, the causal shift."""

import pytest
import torch
from composer.core import DataSpec
from composer.models import HuggingFaceModel
from torch import nn
from torch.utils.data import DataLoader, Dataset

from composer_effalgos import AdaBatch, InfoBatch

transformers = pytest.importorskip('transformers')
VOCABULARY, LENGTH = 20, 12


class Sentences(Dataset):
    """Counting sequences of different lengths, padded; labels leave the padding out."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self):
        return 40

    def __getitem__(self, index):
        length = 4 + index % 9
        tokens = (torch.arange(LENGTH) + index) % (VOCABULARY - 1) + 1
        real = torch.arange(LENGTH) < length
        tokens = torch.where(real, tokens, 0)
        item = {'input_ids': tokens, 'attention_mask': real.long()}
        if self.kind == 'classification':
            return {**item, 'labels': torch.tensor(index % 3)}
        labels = torch.where(real, tokens, -100)
        if self.kind == 'masked':
            chosen = torch.arange(LENGTH) % 3 == index % 3
            labels = torch.where(chosen & real, tokens, -100)
            item['input_ids'] = torch.where(chosen & real, 1, tokens)
        return {**item, 'labels': labels}


def model_of(kind: str) -> HuggingFaceModel:
    torch.manual_seed(0)
    if kind == 'causal':
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        return HuggingFaceModel(transformers.GPT2LMHeadModel(config), use_logits=True)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=LENGTH, hidden_dropout_prob=0, attention_probs_dropout_prob=0, num_labels=3,
    )  # fmt: skip
    head = transformers.BertForMaskedLM if kind == 'masked' else transformers.BertForSequenceClassification
    return HuggingFaceModel(head(config), use_logits=True)


def reference_losses(model: HuggingFaceModel, kind: str) -> torch.Tensor:
    """Each sample alone through the model: Hugging Face's own mean over its tokens."""
    data = Sentences(kind)
    with torch.no_grad():
        return torch.stack([model({name: value[None] for name, value in data[i].items()})['loss'] for i in range(len(data))])


@pytest.mark.parametrize('kind', ['causal', 'masked', 'classification'])
def test_scores_are_the_models_own_loss_of_each_sample(make_trainer, kind):
    algorithm, model = InfoBatch(prune_ratio=0), model_of(kind)
    make_trainer([algorithm], model=model, dataset=Sentences(kind), lr=0.0, batch_size=8, max_duration='1ep').fit()
    assert torch.allclose(algorithm.scores, reference_losses(model, kind), atol=1e-5)


@pytest.mark.parametrize('kind', ['causal', 'masked', 'classification'])
def test_without_pruning_it_trains_on_the_models_own_loss(make_trainer, weights_of, kind):
    trainers = []
    for algorithm in (InfoBatch(prune_ratio=0), AdaBatch(2, '9ep')):  # AdaBatch gives the same order and leaves the loss alone
        trainers.append(make_trainer([algorithm], model=model_of(kind), dataset=Sentences(kind), batch_size=8, max_duration='2ep'))
        trainers[-1].fit()
    assert torch.allclose(*map(weights_of, trainers), atol=1e-5)
    assert int(trainers[0].state.timestamp.token) > 0


@pytest.mark.parametrize('kind', ['causal', 'masked'])
def test_microbatches_that_count_by_tokens_train_on_the_mean_over_the_batch(make_trainer, weights_of, kind):
    """As LLM Foundry sets it; with pruning the weighted samples of a batch keep the whole batch's number of tokens."""

    def tokens(batch):
        labels = batch['labels'][:, 1:] if kind == 'causal' else batch['labels']
        return {'total': labels.numel(), 'loss_generating': int((labels != -100).sum())}

    trainers, saved = [], []
    for microbatch in (None, 3):
        algorithm = InfoBatch(delta=1.0)
        loader = DataSpec(DataLoader(Sentences(kind), batch_size=8, shuffle=True), get_num_tokens_in_batch=tokens)
        arguments = {'accumulate_train_batch_on_tokens': True, 'device_train_microbatch_size': microbatch, 'max_duration': '2ep'}
        trainers.append(make_trainer([algorithm], model=model_of(kind), train_loader=loader, **arguments))
        trainers[-1].fit()
        saved.append(algorithm.samples_saved)
    assert saved[0] == saved[1] > 0
    assert torch.allclose(*map(weights_of, trainers), atol=1e-5)


@pytest.mark.parametrize('kind', ['causal', 'masked', 'classification'])
def test_prunes(make_trainer, kind):
    algorithm = InfoBatch(delta=1.0)
    make_trainer([algorithm], model=model_of(kind), dataset=Sentences(kind), batch_size=8, max_duration='3ep').fit()
    assert algorithm.samples_saved > 0
    assert nn.functional.relu(-algorithm.scores).sum() == 0
