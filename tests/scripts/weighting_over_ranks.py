"""Trains with LinUpper and ESLM on several ranks and holds the weights against one rank's; run by tests through the launcher."""

import tempfile
from pathlib import Path

import torch
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import dist
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from composer_effalgos import ESLM, AdaBatch, InputError, LinUpper
from composer_effalgos.functional import lin_upper, select_above_quantile

torch.set_num_threads(1)
SAMPLES, WORDS, LENGTH, LR = 48, 11, 6, 0.3
TOKENS = torch.randint(WORDS, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))


class Language(ComposerModel):
    """A bigram model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Embedding(WORDS, 8), torch.nn.Tanh(), torch.nn.Linear(8, WORDS))

    def forward(self, batch):
        return self.net(batch[0])

    def loss(self, outputs, batch):
        return cross_entropy(outputs[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())


class Stream(IterableDataset):
    """Every second sequence for the second rank, and one more for the first."""

    def __iter__(self):
        rank, world_size = dist.get_global_rank(), dist.get_world_size()
        return ((tokens, 0) for tokens in TOKENS[rank : SAMPLES - 2 + (rank == 0) : world_size])


def run(algorithms, data=None, part=None, duration='2ep', **arguments) -> torch.Tensor:
    model, table = Language(), TensorDataset(TOKENS, torch.zeros(SAMPLES))
    trainer = Trainer(
        model=model,
        train_dataloader=data if data is not None else DataLoader(table, batch_size=4, sampler=dist.get_sampler(table, shuffle=False)),
        optimizers=torch.optim.SGD(model.parameters(), lr=LR),
        max_duration=duration,
        algorithms=algorithms,
        device_train_microbatch_size=part,
        device='cpu',
        seed=1,
        progress_bar=False,
        **arguments,
    )
    trainer.fit()
    trainer.close()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def alone(weigh, everywhere: bool, part: int = 4) -> torch.Tensor:
    """The same run in one process, without Composer. Global microbatches go round the ranks; weights are over one of them or a rank's."""
    model, world_size = Language(), dist.get_world_size()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(2):
        for batch in TOKENS.split(4 * world_size):
            optimizer.zero_grad()
            for start in range(0, 4 * world_size, part * world_size):
                micro = batch[start : start + part * world_size]  # rank r has every world_size-th
                each = cross_entropy(model([micro])[:, :-1].transpose(1, 2), micro[:, 1:], reduction='none')
                groups = [slice(None)] if everywhere else [slice(rank, None, world_size) for rank in range(world_size)]
                for group in groups:
                    (weigh(each[group]).mean() * len(each[group]) / len(batch)).backward(retain_graph=True)
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_sample(each: torch.Tensor) -> torch.Tensor:
    losses = each.mean(dim=1)
    return lin_upper(losses.detach(), 0.4) * losses


def by_token(each: torch.Tensor) -> torch.Tensor:
    losses = each.flatten()
    return select_above_quantile(losses.detach(), torch.full_like(losses, 1 / len(losses)), 0.4) * losses


def main() -> None:
    dist.initialize_dist('cpu')
    for make, weigh in ((lambda **o: LinUpper(burn_in=None, **o), by_sample), (lambda **o: ESLM(0.4, **o), by_token)):
        ends = []
        for everywhere in (False, True):
            for part in (4, 2):
                ours, theirs = run([make(global_batch=everywhere)], part=part), alone(weigh, everywhere, part)
                assert torch.allclose(ours, theirs, atol=1e-5), (weigh.__name__, everywhere, part, (ours - theirs).abs().max())
                ends.append(ours)
        assert not torch.allclose(ends[0], ends[2], atol=1e-4)  # a rank's own weights are others

    # a run resumed at a batch, growing and shrinking batches over all ranks' losses
    folder = Path(dist.all_gather_object(tempfile.mkdtemp())[0])
    algorithms = lambda: [AdaBatch(schedule='0:4 3ba:6 6ba:2'), ESLM(0.4, global_batch=True)]  # noqa: E731
    saved = {'save_interval': '1ba', 'save_filename': 'ba{batch}.pt', 'save_num_checkpoints_to_keep': -1}
    whole = run(algorithms(), part=3, save_folder=str(folder), **saved)
    for batch in (2, 5, 8):
        assert torch.equal(whole, run(algorithms(), part=3, load_path=str(folder / f'ba{batch}.pt'))), batch

    # the ranks' streams end with batches of 4 and 3: one more microbatch on one of them would wait for ever
    stream = lambda: DataLoader(Stream(), batch_size=4)  # noqa: E731
    run([LinUpper(global_batch=True)], stream(), duration='6ba')
    refused = ''
    try:
        run([LinUpper(burn_in=None, global_batch=True)], stream(), part=1, duration='6ba')
    except InputError as error:
        refused = str(error)
    assert refused.startswith('global_batch: expected the same number of microbatches on every rank, got ['), refused


if __name__ == '__main__':
    main()
