"""Measures the gradient noise over ranks and holds it against per-sample gradients; run by tests through the launcher."""

import argparse

import torch
from composer import Trainer
from composer.core import Callback
from composer.models import ComposerModel
from composer.utils import dist
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch
from composer_effalgos.adabatch import NoiseScale

torch.set_num_threads(1)


class Distance(ComposerModel):
    """``|w - x|^2 / 2``: the gradient of sample x is ``w - x``."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.full((6,), 0.3))

    def forward(self, batch):
        return self.weights - batch[0]

    def loss(self, outputs, batch):
        return 0.5 * outputs.square().sum(dim=1).mean()


class Check(Callback):
    """After each batch: what the policy measured is what the samples of all ranks say."""

    def __init__(self, policy: NoiseScale) -> None:
        self.policy, self.checked, self.sizes = policy, 0, []

    def batch_start(self, state, logger):
        self.mine, self.part = state.batch[0], state.device_train_microbatch_size

    def batch_end(self, state, logger):
        parts = [part for rank in dist.all_gather_object(list(self.mine.split(self.part))) for part in rank]
        gradients = 0.3 - torch.cat(parts).double()
        mean = gradients.mean(dim=0)
        between = sum(len(part) * (0.3 - part.double().mean(dim=0) - mean).square().sum() for part in parts) / (len(parts) - 1)
        expected = torch.stack([between, mean.square().sum() - between / len(gradients)]).float()
        assert torch.allclose(self.policy._averages, expected, rtol=1e-3, atol=1e-3), (self.policy._averages, expected)
        self.checked += 1
        self.sizes.append(len(gradients))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--microbatch', type=int)
    parser.add_argument('--sync')
    parser.add_argument('--points', type=int, default=101)
    options = parser.parse_args()
    dist.initialize_dist('cpu')
    points = TensorDataset(torch.randn(options.points, 6, generator=torch.Generator().manual_seed(3)), torch.zeros(options.points))
    policy = NoiseScale(ratio=1e-6, window='6ba', measure_every=1, decay=0.0)
    check = Check(policy)
    model = Distance()
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(points, batch_size=4, sampler=dist.get_sampler(points, shuffle=True)),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
        max_duration='2ep',
        algorithms=[AdaBatch(2, policy=policy)],
        device='cpu',
        device_train_microbatch_size=options.microbatch,
        ddp_sync_strategy=options.sync,
        seed=1,
        progress_bar=False,
    )
    trainer.state.callbacks.append(check)  # after the policy
    trainer.fit()
    world_size = dist.get_world_size()
    assert check.checked == int(trainer.state.timestamp.batch)
    assert check.sizes[:7] == [4 * world_size] * 6 + [8 * world_size]
    assert sum(check.sizes) == 2 * options.points
    trainer.close()


if __name__ == '__main__':
    main()
