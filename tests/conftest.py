"""Fixtures shared by the whole test suite."""

import contextlib
import functools
import gc
import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.models import ComposerClassifier, ComposerModel
from composer.utils import collect_env
from hypothesis import settings
from torch.distributed.checkpoint import state_dict
from torch.utils.data import DataLoader, Dataset, TensorDataset

SCRIPTS = Path(__file__).parent / 'scripts'

torch.set_num_threads(1)  # the networks here are too small to gain from more

# Every Trainer and every checkpoint asks for the commit that Composer was built from, which searches the files of its distribution.
collect_env.get_composer_commit_hash = functools.cache(collect_env.get_composer_commit_hash)

settings.register_profile('untimed', deadline=None)  # a busy machine fails no test
settings.load_profile('untimed')


# What `make test` runs: these files, and these rows of the contract; everything else counts as long.
_QUICK_ROWS = {'infobatch', 'adabatch', 'glister', 'all'}
_QUICK = {
    *('test_cli.py', 'test_documents.py', 'test_imports.py'),
    *('pruning/test_infobatch.py', 'pruning/test_prune.py', 'pruning/test_rules.py', 'plan/test_loss.py', 'plan/test_planner.py'),
    *('adabatch/test_adabatch.py', 'weighting/test_formulas.py'),
    *('recipes/test_schema.py', 'report/test_equal_budget.py', 'utils/test_checks.py'),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is not for `make test`, and skip what needs a GPU where there is none."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent).as_posix()
        row, _, kind = item.name.partition('[')[2].rstrip(']').partition('-')
        if file not in _QUICK and not (file == 'contract/test_contract.py' and row in _QUICK_ROWS and kind != 'workers'):
            item.add_marker(pytest.mark.long)
    if torch.cuda.is_available():
        return
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of every later collection, which then takes milliseconds."""
    gc.collect()
    gc.freeze()


_ENDED = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Free the Trainers of the last tests, and with them their worker processes: those of all tests would take 11 GB.

    PyTorch keeps every model of which it has saved a state in a cache. Trainers refer to themselves, and are large but few objects, which
    Python itself would rarely collect.
    """
    if next(_ENDED) % 10 == 0 or multiprocessing.active_children():
        state_dict._get_fqns.cache_clear()
        gc.collect()


_CPU = pytest.StashKey[float]()


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # user and system, of this process and of the children that have ended


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the clock of the processor's time that a test takes, whatever else the machine does."""
    item.stash[_CPU] = _cpu_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """Put processor time since the last phase, and the process's largest memory so far, on the report, which xdist carries over."""
    report = yield
    now = _cpu_seconds()
    report.cpu_seconds, item.stash[_CPU] = now - item.stash.get(_CPU, now), now
    report.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what the tests cost; with ``--durations N`` (0 for all) which N cost most."""
    seconds: dict[str, float] = {}
    peak = 0
    for report in (report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, 'cpu_seconds')):
        seconds[report.nodeid] = seconds.get(report.nodeid, 0) + report.cpu_seconds
        peak = max(peak, report.peak_mib)
    terminalreporter.write_line(f'{sum(seconds.values()):.0f} s of CPU time in tests; the largest process had {peak} MiB')
    count = terminalreporter.config.getoption('durations')
    if count is not None:
        for nodeid, spent in sorted(seconds.items(), key=lambda entry: -entry[1])[: count or None]:
            terminalreporter.write_line(f'{spent:8.2f} s CPU  {nodeid}')


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


class Recorder(Callback):
    """Notes what was trained with: the learning rate, the samples and the size of every batch, by epoch."""

    def __init__(self) -> None:
        self.lrs: list[list[float]] = []
        self.sizes: list[list[int]] = []
        self.microbatches: list[int] = []

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.lrs.append([])
        self.sizes.append([])

    def batch_start(self, state: State, logger: Logger) -> None:
        if not self.lrs:  # resumed within an epoch
            self.epoch_start(state, logger)
        self.lrs[-1].append(state.optimizers[0].param_groups[0]['lr'])
        self.sizes[-1].append(len(state.batch['labels' if isinstance(state.batch, dict) else 1]))
        self.microbatches.append(state.device_train_microbatch_size)


@pytest.fixture
def problem() -> TensorDataset:
    """203 samples of 8 numbers in 3 classes, not quite separable."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(203, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] + 0.3 * inputs[:, 2] > 0).long())


@pytest.fixture
def make_trainer(problem: TensorDataset) -> Callable[..., Trainer]:
    """Makes a trainer of a small network, the same weights every time; ``trainer.recorder`` holds what it did."""

    def make(
        algorithms: Sequence[Algorithm] = (),
        *,
        dataset: Dataset | None = None,
        module: torch.nn.Module | None = None,
        loss_fn: Callable | None = None,
        model: ComposerModel | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        lr: float = 0.1,
        max_duration: str = '6ep',
        schedulers: Any = None,
        scheduler_of: Callable[[torch.optim.Optimizer], Any] | None = None,
        optimizer_of: Callable[[Any], torch.optim.Optimizer] | None = None,
        callbacks: Sequence[Callback] = (),
        drop_last: bool = False,
        train_loader: Any = None,
        **trainer_arguments: Any,
    ) -> Trainer:
        torch.manual_seed(0)
        if module is None:
            module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        model = model or ComposerClassifier(module, num_classes=3, **({} if loss_fn is None else {'loss_fn': loss_fn}))
        optimizer = optimizer_of(model.parameters()) if optimizer_of else torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        loader = train_loader
        if loader is None:
            data = problem if dataset is None else dataset
            loader = DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=num_workers, drop_last=drop_last)
        recorder = Recorder()
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            max_duration=max_duration,
            optimizers=optimizer,
            schedulers=schedulers if scheduler_of is None else scheduler_of(optimizer),
            algorithms=list(algorithms),
            callbacks=[recorder, *callbacks],
            device='cpu',
            progress_bar=False,
            seed=1,
            **trainer_arguments,
        )
        trainer.recorder = recorder
        return trainer

    return make


@pytest.fixture
def weights_of() -> Callable[[Trainer], torch.Tensor]:
    """All parameters and buffers of a trainer's model in one vector."""
    return lambda trainer: torch.cat([value.flatten().double() for value in trainer.state.model.state_dict().values()])


class ForkServer:
    """The client of ``scripts/fork_server.py``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.process = folder, 0, None
        self.socket = folder / 'socket'

    def start(self) -> None:
        """Start the server if it does not run, and wait until it listens."""
        if self.process is None:
            self.socket.unlink(missing_ok=True)
            command = [sys.executable, str(SCRIPTS / 'fork_server.py'), str(self.socket)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            while not self.socket.exists():
                assert self.process.poll() is None
                time.sleep(0.05)

    def command(self, *argv: str, ranks: int = 1) -> list[str]:
        """A command that has the server run a script, for code that starts processes by itself."""
        self.start()
        return [sys.executable, '-S', str(SCRIPTS / 'fork_client.py'), str(self.socket), str(ranks), *argv]

    def __call__(self, *argv: str, ranks: int = 1, seconds: float = 300, **environment: str) -> tuple[int, str]:
        """Run a script on forked ranks; gives the largest exit status and what the ranks said, that of the first rank first."""
        self.start()
        self.requests += 1
        outputs = [self.folder / f'{self.requests}-{rank}.txt' for rank in range(ranks)]
        request = {'argv': argv, 'ranks': ranks, 'environment': dict(os.environ) | environment, 'folder': str(Path.cwd())}
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(seconds)
            connection.connect(str(self.socket))
            connection.sendall(json.dumps(request | {'outputs': list(map(str, outputs))}).encode() + b'\n')
            try:
                answer = connection.makefile().readline()
            except TimeoutError:
                self.close()
                answer = ''
        said = '\n'.join(path.read_text(errors='replace') for path in outputs if path.exists())
        assert answer, f'not done in {seconds} seconds: {said[-6000:]}'
        return max(map(abs, json.loads(answer))), said

    def close(self) -> None:
        """Stop the server and what it has started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None


@pytest.fixture(scope='session')
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs a script in processes of its own, without the seconds that importing Composer takes."""
    server = ForkServer(tmp_path_factory.mktemp('forked'))
    yield server
    server.close()


@pytest.fixture
def forked_runs(forked: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of sweeps are forked too."""
    train = ['-m', 'composer_effalgos.train']
    monkeypatch.setattr('composer_effalgos.report.runner._command', lambda recipe, ranks: forked.command(*train, str(recipe), ranks=ranks))


@pytest.fixture(scope='session')
def launch() -> Callable[..., tuple[int, str]]:
    """Runs a script through Composer's launcher, one or one a node as on several machines; gives the exit status and what was said.

    Only what concerns the launcher itself needs it: see ``forked``.
    """

    def run(*script: str, ranks: int = 1, nodes: int = 1) -> tuple[int, str]:
        launcher = [sys.executable, '-m', 'composer.cli', '-n', str(ranks // nodes)]
        commands = [[*launcher, *script]]
        if nodes > 1:
            with socket.socket() as free:
                free.bind(('127.0.0.1', 0))
                port = str(free.getsockname()[1])
            meet = ['--world_size', str(ranks), '--master_addr', '127.0.0.1', '--master_port', port]
            commands = [[*launcher, *meet, '--node_rank', str(node), *script] for node in range(nodes)]
        launched = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands]
        try:
            said = [process.communicate(timeout=300)[0] for process in launched]
        finally:
            for process in launched:
                process.terminate()  # the launcher then stops its ranks
        return max(abs(process.returncode) for process in launched), '\n'.join(said)

    return run


@pytest.fixture
def train_small(tmp_path: Path, forked: ForkServer, launch: Callable[..., tuple[int, str]]) -> Callable[..., dict[str, Any] | None]:
    """Runs ``scripts/train_small.py``, on one rank or several; gives what it saved, or ``None`` where it was killed."""

    def run(folder: str, *arguments: str, ranks: int = 1, nodes: int = 1) -> dict[str, Any] | None:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        script = [str(SCRIPTS / 'train_small.py'), '--folder', str(place), *arguments]
        status, said = forked(*script, ranks=ranks) if nodes == 1 else launch(*script, ranks=ranks, nodes=nodes)
        killed = '--kill-at' in arguments
        assert (status != 0) == killed, said[-6000:]
        return None if killed else torch.load(place / 'final.pt', weights_only=False)

    return run
