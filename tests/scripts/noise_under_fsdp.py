"""Measures the gradient's noise under Composer's FSDP and holds it against whole gradients; run by tests through the launcher, on CPUs."""

import torch
from composer import Trainer
from composer.core import Callback
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from composer_effalgos import AdaBatch
from composer_effalgos.adabatch import NoiseScale, noise_and_signal

torch.set_num_threads(1)
torch.cuda.current_device = lambda: torch.device('cpu')  # type: ignore[assignment,return-value]  # all that Composer asks CUDA for


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


class Compare(Callback):
    """The gradients of each microbatch over all ranks, one after the other in an unsharded twin."""

    def __init__(self, policy: NoiseScale) -> None:
        self.policy, self.compared = policy, 0

    def before_train_batch(self, state, logger):
        twin = network()
        with FullyShardedDataParallel.summon_full_params(state.model, writeback=False):
            values = [value.detach().clone() for value in state.model.parameters()]
        for mine, value in zip(twin.parameters(), values, strict=True):
            mine.data.copy_(value.view_as(mine))
        part = state.device_train_microbatch_size
        everyone = dist.all_gather_object(state.batch)
        parts = [tuple(torch.cat([batch[k][start : start + part] for batch in everyone]) for k in (0, 1))
                 for start in range(0, len(state.batch[1]), part)]  # fmt: skip
        size = sum(len(labels) for _, labels in parts)
        gradients = []
        for inputs, labels in parts:
            loss = nn.functional.cross_entropy(twin(inputs), labels)
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(twin.parameters()))]))
        counts = [len(labels) for _, labels in parts]
        whole = sum(n * g for n, g in zip(counts, gradients, strict=True)) / size
        squares = sum(n * g.square().sum() for n, g in zip(counts, gradients, strict=True))
        self.expected = torch.stack(noise_and_signal(squares, whole.square().sum(), len(parts), size))

    def batch_checkpoint(self, state, logger):  # after the policy has seen the end of the batch
        assert torch.allclose(self.policy._averages, self.expected, rtol=1e-3, atol=1e-6), (self.policy._averages, self.expected)
        self.compared += 1


def main() -> None:
    dist.initialize_dist('cpu')
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(96, 8, generator=generator), torch.arange(96) % 3)
    for microbatch in (None, 3):
        policy = NoiseScale(ratio=1e9, window='1ep', measure_every=1, decay=0.0)
        compare, model = Compare(policy), ComposerClassifier(network(), num_classes=3)
        Trainer(
            model=model,
            train_dataloader=DataLoader(data, batch_size=8, sampler=dist.get_sampler(data, shuffle=True)),
            optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
            max_duration='1ep',
            algorithms=[AdaBatch(policy=policy)],
            callbacks=[compare],
            parallelism_config={'fsdp': {'sharding_strategy': 'FULL_SHARD', 'state_dict_type': 'sharded'}},
            device_train_microbatch_size=microbatch,
            device='cpu',
            seed=1,
            progress_bar=False,
        ).fit()
        assert compare.compared == 6, compare.compared


if __name__ == '__main__':
    main()
