"""What weights and scores cost a language model with a large vocabulary, whose logits are most of the memory of a step.

Plain Composer, ``InfoBatch(prune_ratio=0)`` (scores, no weights) and the same with weights in every epoch train the same GPT-2 with the
vocabulary of the published one in one process and take turns batch by batch; ``plain again`` is plain Composer once more, which shows what
the measurement can resolve. Times are the process's (CPU time), which other work on the machine does not lengthen.

In the first batch and in those whose number is a power of two the per-sample losses are checked against the model's own: they are counted
apart, and left out of the medians.

Memory is measured in a process of its own for each way: the peak of what torch's allocator holds within one step (exact, from its own
events), once with a check and once without, and the peak of the process's resident memory over three steps, two of them with a check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
import transformers
from composer import Callback, Logger, State, Trainer
from composer.core import Algorithm
from composer.models import HuggingFaceModel
from infobatch_overhead import Relay, Runner, Turn, take_turns
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader, Dataset

from composer_effalgos import InfoBatch
from composer_effalgos.plan import EpochPlanner
from composer_effalgos.utils.machine import peak_resident_bytes

WAYS = ('plain', 'plain again', 'scores', 'scores and weights')


class Sentences(Dataset):
    """Random tokens; the last eighth of every second sentence is padding."""

    def __init__(self, args: argparse.Namespace, batches: int) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        self.tokens = torch.randint(args.vocabulary, (batches * args.batch_size, args.length), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = self.tokens[index]
        labels = tokens.clone()
        labels[len(tokens) - index % 2 * len(tokens) // 8 :] = -100
        return {'input_ids': tokens, 'labels': labels}


class Weights(Callback):
    """Gives the samples of each epoch weights of 1 and 2, as a pruned epoch has them, and prunes none."""

    def batch_start(self, state: State, logger: Logger) -> None:
        loss = EpochPlanner.of(state).loss
        assert loss is not None
        assert state.train_dataloader is not None
        loss.start_epoch(1 + torch.arange(len(state.train_dataloader.dataset)).float() % 2)  # type: ignore[attr-defined]


def make_trainer(way: str, args: argparse.Namespace, batches: int, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A trainer of one epoch of so many batches."""
    torch.manual_seed(args.seed)
    config = transformers.GPT2Config(
        vocab_size=args.vocabulary, n_positions=args.length, n_embd=args.width, n_layer=args.layers, n_head=2, use_cache=False
    )
    model = HuggingFaceModel(transformers.GPT2LMHeadModel(config))
    algorithms: list[Algorithm] = [InfoBatch(prune_ratio=0)] if way.startswith('scores') else []
    return Trainer(
        model=model,
        train_dataloader=DataLoader(Sentences(args, batches), batch_size=args.batch_size),
        optimizers=torch.optim.SGD(model.parameters(), lr=1e-3),
        max_duration='1ep',
        algorithms=algorithms,
        callbacks=[*([Weights()] if way == 'scores and weights' else []), *callbacks],
        device='cpu',
        progress_bar=False,
        seed=args.seed,
    )


def is_checked(batch: int) -> bool:
    """Whether the per-sample losses are checked in batch number ``batch``, counted from 0."""
    return batch + 1 & batch == 0


def compare(turns: Sequence[Sequence[Turn]]) -> list[dict[str, Any]]:
    """CPU time of a step for each of :data:`WAYS`, against plain Composer's step by step.

    Gives medians, and the ratios' quartiles, of steps without a check; the median ratio of those with one.
    """
    found = []
    for way, ours in zip(WAYS, turns, strict=True):
        pairs = list(zip(ours, turns[0], strict=True))[2:]  # what is done once is done
        ratios = sorted(a.cpu_seconds / b.cpu_seconds for a, b in pairs if not is_checked(a.batch))
        checked = [a.cpu_seconds / b.cpu_seconds for a, b in pairs if is_checked(a.batch)]
        found.append(
            {
                'way': way,
                'steps': len(ratios),
                'cpu_seconds': median(a.cpu_seconds for a, _ in pairs if not is_checked(a.batch)),
                'ratio': median(ratios),
                'ratio_quartiles': [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
                'ratio_checked': median(checked) if checked else None,
            }
        )
    return found


class Steps(Callback):
    """Marks the steps in a profile."""

    def batch_start(self, state: State, logger: Logger) -> None:
        self.mark = record_function(f'step {int(state.timestamp.batch)}')
        self.mark.__enter__()

    def batch_end(self, state: State, logger: Logger) -> None:
        self.mark.__exit__(None, None, None)


def peaks_of_steps(events: Iterable[Any]) -> dict[str, int]:
    """The most bytes that torch's allocator held within each marked step, by the profiler's memory events."""
    events = sorted(events, key=lambda event: event.start_ns())
    spans = {
        event.name(): (event.start_ns(), event.start_ns() + event.duration_ns()) for event in events if event.name().startswith('step ')
    }
    held, peaks = 0, dict.fromkeys(spans, 0)
    for event in events:
        if event.name() == '[memory]':
            held += event.nbytes()
            for name, (start, end) in spans.items():
                if start <= event.start_ns() <= end:
                    peaks[name] = max(peaks[name], held)
    return peaks


def measure_memory(way: str, args: argparse.Namespace) -> dict[str, int]:
    """Peaks in bytes, the model included: of step 3 (counted from 0), which is checked, of step 4, which is not, and of the process."""
    make_trainer(way, args, 3).fit()
    resident = peak_resident_bytes()  # before the profiler, whose events take memory too
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        make_trainer(way, args, 5, [Steps()]).fit()
    assert profiler.profiler is not None
    peaks = peaks_of_steps(profiler.profiler.kineto_results.events())
    return {'step': peaks['step 4'], 'checked_step': peaks['step 3'], 'resident': resident}


def in_a_process_of_its_own(way: str, argv: Sequence[str]) -> dict[str, int]:
    """:func:`measure_memory` elsewhere, so that nothing else has touched the process's memory."""
    command = [sys.executable, __file__, *argv, '--memory-of', way]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    settings, mib = results['settings'], 2**20
    times = [
        [
            row['way'],
            f'{1e3 * row["cpu_seconds"]:.0f}',
            f'{100 * (row["ratio"] - 1):+.1f} %',
            ' to '.join(f'{100 * (end - 1):+.1f}' for end in row['ratio_quartiles']),
            '' if row['ratio_checked'] is None else f'{100 * (row["ratio_checked"] - 1):+.0f} %',
        ]
        for row in results['times']
    ]
    plain = results['memory']['plain']
    memory = [
        [way, *(f'{row[key] / mib:.0f} ({100 * (row[key] / plain[key] - 1):+.1f} %)' for key in ('step', 'checked_step', 'resident'))]
        for way, row in results['memory'].items()
    ]
    logits = 4 * settings['vocabulary'] * settings['batch_size'] * settings['length'] / mib
    return (
        f'GPT-2 with {settings["layers"]} layers of {settings["width"]} and a vocabulary of {settings["vocabulary"]:,}, batches of '
        f'{settings["batch_size"]} x {settings["length"]} tokens ({logits:.0f} MiB of logits), fp32; '
        f'{results["times"][0]["steps"]} steps that are not checked.\n\n'
        + record.table(['', 'CPU ms a step', 'beside plain, median', 'quartiles, %', 'with a check'], times)
        + '\nPeak memory in MiB, of the tensors within a step and of the process:\n\n'
        + record.table(['', 'step', 'step with a check', 'process'], memory)
    )


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Measures what the command line says and writes ``language_model_overhead.{json,md}``."""
    parser = argparse.ArgumentParser(description='The cost of scores and weights for a language model.')
    parser.add_argument('--out', type=Path, default=Path('benchmarks/results'), help='folder for the results')
    parser.add_argument('--vocabulary', type=int, default=50257)
    parser.add_argument('--layers', type=int, default=2)
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--length', type=int, default=256)
    parser.add_argument('--steps', type=int, default=40)
    parser.add_argument('--seed', type=int, default=17)
    parser.add_argument('--memory-of', choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory_of is not None:
        print(json.dumps(measure_memory(args.memory_of, args)))
        return None
    given = sys.argv[1:] if argv is None else argv
    memory = {way: in_a_process_of_its_own(way, given) for way in WAYS if way != 'plain again'}
    relay = Relay(len(WAYS), lambda: None)
    trainers = [make_trainer(way, args, args.steps, [Runner(relay, who)]) for who, way in enumerate(WAYS)]
    times = compare(take_turns(relay, [trainer.fit for trainer in trainers]))
    for trainer in trainers:
        trainer.close()
    settings = {key: value for key, value in vars(args).items() if key not in ('out', 'memory_of')}
    results = {'settings': settings, 'times': times, 'memory': memory}
    title = 'Scores and weights of a language model'
    return record.write(args.out, 'language_model_overhead', results, markdown(results), title=title)


if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    main()
