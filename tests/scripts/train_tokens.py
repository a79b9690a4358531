"""Trains a small GPT-2 on a StreamingDataset of tokens; run by tests in processes of its own, and killed by them."""

import argparse
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from composer import Trainer
from composer.core import Callback
from composer.models import HuggingFaceModel
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import dist
from streaming import MDSWriter, Stream, StreamingDataLoader, StreamingDataset
from transformers import GPT2Config, GPT2LMHeadModel

from composer_effalgos import AdaBatch, InfoBatch, SubsetSelection

torch.set_num_threads(1)
SAMPLES, LENGTH, WORDS = 96, 8, 128


def write_tokens(folder: Path) -> None:
    """96 sequences that count upwards, half of them with an error, in shards of some 10."""
    generator = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns={'tokens': 'ndarray:uint16'}, size_limit=400) as out:
        for number in range(SAMPLES):
            tokens = (number + np.arange(LENGTH)) % WORDS
            tokens[-1] = generator.integers(WORDS) if number % 2 else tokens[-1]
            out.write({'tokens': tokens.astype(np.uint16)})


class Counted(Stream):
    """Notes each shard that is fetched."""

    def prepare_shard(self, shard):
        with (Path(self.local) / 'fetched.txt').open('a') as file:
            file.write(f'{shard.raw_data.basename}\n')
        return super().prepare_shard(shard)


class Tokens(StreamingDataset):
    """As llm-foundry's: a sample is what the model takes."""

    def __getitem__(self, at):
        return {'input_ids': torch.from_numpy(super().__getitem__(at)['tokens'].astype(np.int64))}


def collate(samples: list[dict]) -> dict:
    """A batch for a causal language model."""
    tokens = torch.stack([sample['input_ids'] for sample in samples])
    return {'input_ids': tokens, 'attention_mask': torch.ones_like(tokens), 'labels': tokens.clone()}


class Watch(Callback):
    """Notes the sequences of every batch, and kills the process when told to."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at = kill_at
        self.batches: list[list[tuple[int, ...]]] = []

    def batch_start(self, state, logger):
        self.batches.append([tuple(tokens) for tokens in state.batch['input_ids'].tolist()])

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) == self.kill_at and dist.get_global_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def train(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--remote', required=True)
    parser.add_argument('--algorithms', nargs='*', default=[])
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--kill-at', type=int)
    parser.add_argument('--duration', default='4ep')
    options = parser.parse_args(arguments)
    os.environ['AWS_ACCESS_KEY_ID'] = f'rank{os.environ["RANK"]}'  # tells the server of an s3:// remote who asks

    known = {
        'infobatch': lambda: InfoBatch(0.5, delta=1.0),
        'adabatch': lambda: AdaBatch(2, milestones=['9ba', '17ba'], lr_factor=0.8),
        'subset': lambda: SubsetSelection('random', 0.75),
    }
    torch.manual_seed(0)
    size = {'n_positions': LENGTH, 'n_embd': 16, 'n_layer': 1, 'n_head': 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **size))
    streams = [Counted(remote=options.remote, local=str(options.folder / 'local'))]
    dataset = Tokens(streams=streams, shuffle=True, shuffle_block_size=20, batch_size=6)
    watch = Watch(options.kill_at)
    trainer = Trainer(
        model=HuggingFaceModel(model, shift_labels=True),
        train_dataloader=StreamingDataLoader(dataset, batch_size=6, num_workers=options.workers, collate_fn=collate),
        optimizers=torch.optim.AdamW(model.parameters(), lr=0.01),
        schedulers=CosineAnnealingWithWarmupScheduler('1ep', '1dur'),
        max_duration=options.duration,
        algorithms=[known[name]() for name in options.algorithms],
        callbacks=[watch],
        device='cpu',
        seed=1,
        progress_bar=False,
        run_name='tokens',
        save_folder=str(options.folder / 'checkpoints'),
        save_interval='5ba',
        save_num_checkpoints_to_keep=1,
        autoresume=True,
    )
    trainer.fit()
    batches = dist.all_gather_object(watch.batches)
    saved = [algorithm.samples_saved for algorithm in trainer.state.algorithms if isinstance(algorithm, InfoBatch)]
    if dist.get_global_rank() == 0:
        torch.save({'model': model.state_dict(), 'batches': batches, 'saved': saved}, options.folder / 'final.pt')
    trainer.close()


if __name__ == '__main__':
    train(sys.argv[1:])
