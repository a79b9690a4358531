import json
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from composer_effalgos import EfficiencyMonitor, InputError
from composer_effalgos.adabatch.schedules import find_schedule
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.checkpoints import check_checkpoint
from composer_effalgos.recipes.schema import Recipe, load_recipe, parse_recipe
from composer_effalgos.recipes.settings import list_recipes, recipe_folder
from composer_effalgos.train import main

RECIPE = """
run_name: small
seed: 3
max_duration: 4ep
save_folder: {folder}
progress_bar: false
dataset: {{name: synthetic, batch_size: 16, num_samples: 64, eval_samples: 32, num_classes: 4, image_size: 8}}
model: {{name: resnet20_cifar}}
optimizer: {{name: sgd, lr: 0.05, momentum: 0.9}}
scheduler: {{name: one_cycle, max_lr: 0.1}}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / 'small.yaml'
    path.write_text(RECIPE.format(folder=tmp_path / 'runs'))
    return path


def summary(folder: Path, run_name: str = 'small') -> dict:
    return json.loads((folder / 'runs' / run_name / 'summary.json').read_text())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, map_location='cpu', weights_only=False)['state']['model']


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def refused(capfd, *argv: object) -> str:
    """The one line on stderr of a refused run."""
    assert main([str(item) for item in argv]) == 2
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    assert 'Traceback' not in captured.err
    assert captured.out == ''
    return lines[0]


def test_a_run_trains_and_writes_its_summary(recipe_file, tmp_path, capfd):
    assert main([str(recipe_file), 'max_duration=6ep', 'dataset.noise=0.2']) == 0
    written = summary(tmp_path)
    assert (written['run_name'], written['seed'], written['world_size']) == ('small', 3, 1)
    assert written['recipe']['max_duration'] == '6ep'
    assert [entry['samples'] for entry in written['epochs']] == [64] * 6
    assert written['totals']['eval_accuracy'] > 0.5  # chance is 0.25
    out = capfd.readouterr().out.splitlines()
    assert out[-1].startswith(f'small: accuracy {written["totals"]["eval_accuracy"]:.4f}, 384 samples (0.0% saved), ')
    assert out[-1].endswith('runs/small/summary.json')


def test_the_seed_decides_weights_and_order(recipe_file, tmp_path):
    def after_one_epoch(run_name: str, seed: int) -> dict[str, torch.Tensor]:
        assert main([str(recipe_file), f'run_name={run_name}', f'seed={seed}', 'max_duration=1ep', 'save_interval=1ep']) == 0
        return weights(tmp_path / 'runs' / run_name / 'checkpoints' / 'ep1-ba4-rank0.pt')

    first = after_one_epoch('a', 1)
    assert same(first, after_one_epoch('b', 1))
    assert not same(first, after_one_epoch('c', 2))


def test_the_learning_rate_peaks_at_max_lr_and_ends_at_nearly_nothing(recipe_file):
    trainer = build_trainer(load_recipe(recipe_file, ['optimizer.lr=7', 'scheduler.pct_start=0.5']))
    rates = []
    group = trainer.state.optimizers[0].param_groups[0]
    optimizer_step = trainer.state.optimizers[0].step

    def step(*args, **kwargs):
        rates.append(group['lr'])
        return optimizer_step(*args, **kwargs)

    trainer.state.optimizers[0].step = step
    trainer.fit()
    trainer.close()
    assert len(rates) == 16
    # Composer's schedules lag by one batch
    assert rates[:2] == [0.1 / 25] * 2
    assert max(rates) == pytest.approx(0.1)
    assert group['lr'] == pytest.approx(0.1 / 25 / 1e4)


def test_every_run_has_one_monitor(recipe_file):
    trainer = build_trainer(load_recipe(recipe_file))
    assert sum(isinstance(callback, EfficiencyMonitor) for callback in trainer.state.callbacks) == 1


def test_half_precision_runs_in_full_precision_on_a_cpu_without_it(recipe_file, caplog, monkeypatch):
    monkeypatch.setattr('composer_effalgos.recipes.build.has_bf16', lambda: False)
    trainer = build_trainer(load_recipe(recipe_file, ['precision=amp_bf16', 'device=cpu']))
    assert trainer.state.precision == 'fp32'
    assert [record.getMessage() for record in caplog.records if 'amp_bf16' in record.getMessage()] == [
        'note: precision amp_bf16 needs a GPU or a CPU with AVX-512 BF16 or AMX; running in fp32'
    ]


@pytest.mark.parametrize('resume', ['load_path', 'autoresume'])
def test_a_resumed_run_ends_with_the_same_weights(recipe_file, tmp_path, resume):
    whole = [str(recipe_file), 'save_interval=1ep', 'algorithms.infobatch={}']
    assert main([*whole, 'run_name=whole']) == 0
    checkpoints = tmp_path / 'runs' / 'whole' / 'checkpoints'
    expected = weights(checkpoints / 'latest-rank0.pt')
    second = next(checkpoints.glob('ep2-*.pt'))
    if resume == 'load_path':
        assert main([*whole, 'run_name=again', f'load_path={second}']) == 0
        checkpoints = tmp_path / 'runs' / 'again' / 'checkpoints'
    else:
        for path in [*checkpoints.glob('ep3-*.pt'), *checkpoints.glob('ep4-*.pt'), checkpoints / 'latest-rank0.pt']:
            path.unlink()
        (checkpoints / 'latest-rank0.pt').symlink_to(second.name)
        assert main([*whole, 'run_name=whole', 'autoresume=true']) == 0
    assert same(weights(checkpoints / 'latest-rank0.pt'), expected)
    assert len(summary(tmp_path, checkpoints.parent.name)['epochs']) == 4


def test_checkpoints_of_finished_runs(recipe_file, tmp_path, capfd):
    saving = [str(recipe_file), 'save_interval=1ep', 'max_duration=1ep']
    assert main(saving) == 0
    latest = tmp_path / 'runs' / 'small' / 'checkpoints' / 'latest-rank0.pt'
    before = latest.resolve().stat().st_mtime_ns
    capfd.readouterr()
    assert 'choose another run_name' in refused(capfd, *saving)
    assert 'max_duration: expected more than the 1ep of the checkpoint' in refused(capfd, *saving, f'load_path={latest}', 'run_name=other')
    assert 'checkpoint is of another model' in refused(capfd, *saving, f'load_path={latest}', 'run_name=other', 'model.name=resnet56_cifar')
    # Nothing is left to do, and nothing is done
    assert main([*saving, 'autoresume=true']) == 0
    assert latest.resolve().stat().st_mtime_ns == before
    assert main([*saving, 'save_overwrite=true']) == 0


def test_a_run_goes_on_with_its_own_settings_only(recipe_file, tmp_path, capfd):
    run = [str(recipe_file), 'save_interval=1ep', 'autoresume=true', 'scheduler=null', 'algorithms.infobatch=null']
    assert main([*run, 'max_duration=1ep']) == 0
    folder = tmp_path / 'runs' / 'small'
    path = folder / 'summary.json'
    before = path.read_bytes()
    capfd.readouterr()
    for override, difference in {
        'dataset.batch_size=8': 'dataset.batch_size: 16 there, 8 now',
        'optimizer.lr=0.001': 'optimizer.lr: 0.05 there, 0.001 now',
        'optimizer.nesterov=true': 'optimizer.nesterov: None there, True now',
        'seed=5': 'seed: 3 there, 5 now',
        'dataset.num_samples=80': 'dataset.num_samples: 64 there, 80 now',
        'algorithms=null': 'algorithms.infobatch: {} there, None now',
    }.items():
        for duration in ('1ep', '2ep'):
            line = refused(capfd, *run, f'max_duration={duration}', override)
            assert line == (
                f'error: {recipe_file}: autoresume: {path}: {difference}; set it back, choose another run_name, or remove {folder}'
            )
    assert path.read_bytes() == before
    free = ['dataset.eval_batch_size=4', 'dataset.num_workers=1', 'eval_interval=2ep', 'device=cpu', 'callbacks.lr_monitor={}']
    assert main([*run, *free, 'max_duration=2ep']) == 0
    assert [entry['samples'] for entry in summary(tmp_path)['epochs']] == [64, 64]
    path.unlink()  # as in a run killed before its first epoch ended
    assert main([*run, 'max_duration=3ep', 'optimizer.lr=0.01']) == 0


@pytest.mark.parametrize(
    'settings',
    [
        ['max_duration=3ep', 'eval_interval=2ep', 'algorithms.infobatch.delta=1.0'],
        ['max_duration=1ep', 'eval_interval=2ep'],
        ['max_duration=10ba', 'eval_interval=1ep'],
        ['max_duration=10ba', 'eval_interval=3ba'],
        ['max_duration=6ba', 'eval_interval=0'],
    ],
)
def test_a_run_stopped_in_its_last_evaluation_is_evaluated_when_resumed(recipe_file, tmp_path, monkeypatch, capfd, settings):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    run = [str(recipe_file), 'save_interval=1ep', 'autoresume=true', 'dataset.noise=1.0', *settings]
    assert main([*run, 'run_name=whole']) == 0
    with monkeypatch.context() as patch:
        patch.setattr(EfficiencyMonitor, 'fit_end', stop)
        with pytest.raises(KeyboardInterrupt):
            main(run)

    def measured(name: str) -> list[tuple]:
        keys = ('epoch', 'samples', 'batches', 'lr', 'train_loss', 'eval_accuracy', 'eval_loss')
        written = summary(tmp_path, name)
        totals = [written['totals'][key] for key in ('eval_accuracy', 'eval_loss', 'samples_seen', 'samples_full')]
        return [*(tuple(entry[key] for key in keys) for entry in written['epochs']), totals]

    stopped = tmp_path / 'runs' / 'small' / 'summary.json'
    assert not stopped.exists() or measured('small') != measured('whole')
    capfd.readouterr()
    assert main(run) == 0
    assert measured('small') == measured('whole')
    quality = f'accuracy {summary(tmp_path)["totals"]["eval_accuracy"]:.4f}' if settings[-1] != 'eval_interval=0' else 'no evaluation'
    assert capfd.readouterr().out.splitlines()[-1].startswith(f'small: {quality}, ')
    before = stopped.stat().st_mtime_ns
    assert main(run) == 0
    assert stopped.stat().st_mtime_ns == before  # it is complete now


def test_a_run_stopped_at_its_end_within_a_planned_epoch_says_so(recipe_file, tmp_path, monkeypatch, capfd):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    run = [str(recipe_file), 'save_interval=1ep', 'autoresume=true', 'max_duration=6ba', 'algorithms.infobatch={}', 'scheduler=null']
    with monkeypatch.context() as patch:
        patch.setattr(EfficiencyMonitor, 'fit_end', stop)
        with pytest.raises(KeyboardInterrupt):
            main(run)
    capfd.readouterr()
    assert 'the run was stopped in its last evaluation' in refused(capfd, *run)
    assert main([*run, 'max_duration=7ba', 'eval_interval=7ba']) == 0
    finished = summary(tmp_path)
    assert finished['epochs'][-1]['eval_accuracy'] is not None
    # That evaluation is in the checkpoint as well, so it cannot be told from an older one and is repeated
    assert main([*run, 'max_duration=7ba', 'eval_interval=7ba']) == 0
    again = summary(tmp_path)
    assert again['epochs'] == finished['epochs']
    assert again['totals'] == finished['totals'] | {'peak_memory_bytes': again['totals']['peak_memory_bytes']}


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process can grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_the_first_checkpoint(recipe_file, tmp_path, capfd):
    saving = [str(recipe_file), 'save_interval=1ep', 'max_duration=1ep', 'autoresume=true']
    with room(1 << 16):
        assert 'File too large; files saved before are complete' in refused(capfd, *saving)
    checkpoints = tmp_path / 'runs' / 'small' / 'checkpoints'
    assert [path.name for path in checkpoints.iterdir()] == ['ep1-ba4-rank0.pt']  # a part of it, and not marked as the latest
    assert main(saving) == 0
    assert weights(checkpoints / 'latest-rank0.pt')


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / 'good.pt'
    torch.save({'state': {'model': {'x': torch.arange(1000.0)}}}, path)
    check_checkpoint('load_path', path, weights_only=True)
    with pytest.raises(InputError, match=r'state\.optimizers is missing'):
        check_checkpoint('load_path', path)
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        'cut off': content[:middle],
        'damaged checkpoint': content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        'not a checkpoint': b'text',
    }
    for expected, data in damaged.items():
        bad = tmp_path / 'bad.pt'
        bad.write_bytes(data)
        with pytest.raises(InputError, match=expected):
            check_checkpoint('load_path', bad)
    torch.save({'weights': 1}, bad)
    with pytest.raises(InputError, match="has no 'state'"):
        check_checkpoint('load_path', bad)
    with pytest.raises(InputError, match='no such checkpoint'):
        check_checkpoint('load_path', tmp_path / 'none.pt')


def without(mapping: dict, name: str) -> None:
    del mapping[name]


EDITS = {
    'state.model is of type int': lambda content: content['state'].update(model=3),
    'is not a tensor': lambda content: content['state']['model'].update(x=3),
    'state.optimizers is of type list': lambda content: content['state'].update(optimizers=[]),
    'state.optimizers is missing': lambda content: without(content['state'], 'optimizers'),
    'state.algorithms is of type int': lambda content: content['state'].update(algorithms=1),
    'state.algorithms: names and states are not in pairs': lambda content: content['state'].update(algorithms=[1]),
    'rng is not a list': lambda content: content.update(rng=3),
    "has no 'state'": lambda content: content.update(state=3),
    'state.timestamp is missing': lambda content: without(content['state'], 'timestamp'),
    'state.timestamp has no Timestamp': lambda content: content['state'].update(timestamp={}),
    'state.timestamp: epoch is -1': lambda content: content['state']['timestamp']['Timestamp'].update(epoch=-1),
    "state.timestamp: batch is 'x'": lambda content: content['state']['timestamp']['Timestamp'].update(batch='x'),
    'batch_in_epoch is greater than batch': lambda content: content['state']['timestamp']['Timestamp'].update(batch_in_epoch=9),
}


def test_edited_checkpoints_are_refused(recipe_file, tmp_path, capfd):
    saving = [str(recipe_file), 'save_interval=1ep', 'algorithms.infobatch.delta=1.0']
    assert main([*saving, 'max_duration=1ep']) == 0
    good, edited = tmp_path / 'runs' / 'small' / 'checkpoints' / 'ep1-ba4-rank0.pt', tmp_path / 'edited.pt'
    check_checkpoint('load_path', good)
    for expected, edit in EDITS.items():
        content = torch.load(good, weights_only=False)
        edit(content)
        torch.save(content, edited)
        with pytest.raises(InputError, match=f'^load_path: {edited}: .*{expected}'):
            check_checkpoint('load_path', edited)

    capfd.readouterr()
    monitor = torch.load(good, weights_only=False)['state']['callbacks']['EfficiencyMonitor']
    epochs = [monitor['epochs'][0] | {'samples': 'many'}]
    for expected, state in {
        'epochs: expected list, got None': {},
        "samples: expected int, got 'many'": monitor | {'epochs': epochs},
    }.items():
        content = torch.load(good, weights_only=False)
        content['state']['callbacks']['EfficiencyMonitor'] = state
        torch.save(content, edited)
        line = refused(capfd, *saving, 'run_name=other', f'load_path={edited}')
        assert line.startswith(f'error: {recipe_file}: load_path: ')
        assert expected in line

    content = torch.load(good, weights_only=False)
    optimizer = next(iter(content['state']['optimizers'].values()))
    next(iter(optimizer['state'].values())).clear()
    torch.save(content, edited)
    assert 'entries that some of them lack' in refused(capfd, *saving, 'run_name=other', f'load_path={edited}')
    optimizer['state'].clear()
    torch.save(content, edited)
    assert 'state.optimizers: expected the state of SGD for every parameter alike, got none' in refused(
        capfd, *saving, 'run_name=other', f'load_path={edited}'
    )
    latest, kept = good.parent / 'latest-rank0.pt', good.read_bytes()
    content = torch.load(good, weights_only=False)
    content['state']['algorithms'] = []
    torch.save(content, latest.resolve())
    line = refused(capfd, *saving, 'autoresume=true', 'max_duration=2ep')
    assert 'autoresume: ' in line
    assert 'state.algorithms: expected InfoBatch, which the recipe has, got none' in line
    latest.resolve().write_bytes(kept)

    other_data = 'dataset.num_samples=80', 'autoresume=true'
    line = refused(capfd, *saving, *other_data, 'max_duration=2ep')
    assert line.startswith(f'error: {recipe_file}: autoresume: ')


@pytest.mark.parametrize('path', ['{x}', '{', '{0}'])
def test_unknown_placeholders_in_load_path_are_refused(recipe_file, capfd, path):
    recipe_file.write_text(recipe_file.read_text() + f"load_path: '{path}'\n")
    assert f'{recipe_file}: load_path: expected a path with no other braces' in refused(capfd, recipe_file)


@pytest.mark.parametrize(
    ('override', 'expected'),
    [
        ('dataset.batch_size=65', 'dataset.batch_size: expected at most the 64 samples of the dataset, got 65'),
        ('model.num_classes=3', 'model.num_classes: expected at least the 4 classes of the dataset, got 3'),
        ('model.name=resnet21_cifar', 'model.name'),
        ('optimizer.lr=-1', 'optimizer: Invalid learning rate'),
        ('scheduler.max_lr=0', 'scheduler: max_lr: expected a number greater than 0, got 0'),
        ('algorithms.infobatch.prune_ratio=1.0', 'algorithms.infobatch: '),
        ('algorithms.adabatch.growth_factor=1', 'algorithms.adabatch: '),
        ('algorithms.swa.swa_start=soon', 'algorithms.swa: '),
        ('device=tpux', 'device: '),
        ('save_folder=s3://bucket/runs', 'save_folder: expected a folder of this machine'),
        ('load_path=hf://x', 'load_path: hf://x: '),
        ('load_path=none.pt', 'load_path: none.pt: no such checkpoint'),
        ('device_train_microbatch_size=auto', 'device_train_microbatch_size'),
        ('algorithms={subset_selection: {fracton: 0.3}}', 'fracton'),
    ],
)
def test_what_cannot_run_is_refused_with_nothing_written(recipe_file, tmp_path, capfd, override, expected):
    line = refused(capfd, recipe_file, override)
    assert line.startswith(f'error: {recipe_file}: ')
    assert expected in line
    assert not list((tmp_path / 'runs').rglob('*.*'))


def test_a_network_for_images_of_another_size_is_refused(recipe_file, capfd):
    assert 'model.image_size: expected the size of the images, 8x8 pixels, got 32x32' in refused(capfd, recipe_file, 'model.name=keskar_c1')


def test_a_schedules_time_below_a_batch_is_refused(recipe_file, capfd):
    recipe_file.write_text(re.sub('scheduler:.*', 'scheduler: {name: step, step_size: 0.001dur}', recipe_file.read_text()))
    assert 'scheduler: expected times of at least a batch of this run, got step_size=0.001dur' in refused(capfd, recipe_file)


@pytest.mark.parametrize('name', ['cifar10', 'image_folder', 'image_parquet'])
def test_missing_data_is_refused(recipe_file, tmp_path, capfd, name):
    nowhere = tmp_path / 'nowhere'
    recipe_file.write_text(re.sub('dataset:.*', f'dataset: {{name: {name}, path: {nowhere}, batch_size: 4}}', recipe_file.read_text()))
    assert f'got {nowhere}, which is not a folder' in refused(capfd, recipe_file)
    nowhere.mkdir()
    assert str(nowhere) in refused(capfd, recipe_file)


def test_a_missing_recipe_is_refused(tmp_path, capfd):
    assert 'expected a file, got none' in refused(capfd, tmp_path / 'none.yaml')


def broken_images(recipe_file: Path, tmp_path: Path, loading: str) -> Path:
    """Makes the recipe's data a folder of images, one of which is cut off."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            folder = tmp_path / 'images' / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f'{index}.png')
    broken = tmp_path / 'images' / 'train' / 'dog' / '2.png'
    broken.write_bytes(broken.read_bytes()[:60])
    data = f'dataset: {{name: image_folder, path: {tmp_path / "images"}, {loading}}}\n'
    recipe_file.write_text(re.sub('dataset:.*\n', data, recipe_file.read_text()))
    return broken


def test_a_corrupt_image_in_a_worker_is_one_line(recipe_file, tmp_path, capfd):
    broken = broken_images(recipe_file, tmp_path, 'batch_size: 4, num_workers: 1')
    line = refused(capfd, recipe_file)
    assert str(broken) in line
    assert 'corrupt image' in line


def test_accuracy_on_training_batches_is_measured_where_it_is_asked_for(recipe_file):
    trained = []
    for wanted in (False, True):
        trainer = build_trainer(load_recipe(recipe_file, [f'model.train_metrics={str(wanted).lower()}', 'max_duration=1ep']))
        trainer.fit()
        assert list(trainer.state.train_metrics) == (['MulticlassAccuracy'] if wanted else [])
        assert list(trainer.state.eval_metrics['eval']) == ['CrossEntropy', 'MulticlassAccuracy']
        trained.append(trainer.state.model.state_dict())
    assert same(*({key: value for key, value in weights.items() if 'metrics' not in key} for weights in trained))


def test_a_worker_that_dies_is_one_line(recipe_file, tmp_path, capfd, monkeypatch):
    for split in ('train', 'val'):
        for index in range(8):
            path = tmp_path / 'images' / split / ('cat', 'dog')[index % 2] / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (16, 16)).save(path)

    def killed(*arguments):  # as the kernel does it where memory runs out
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr('composer_effalgos.datasets.image_folder.decode_image', killed)
    data = f'dataset: {{name: image_folder, path: {tmp_path / "images"}, batch_size: 4, num_workers: 1}}\n'
    recipe_file.write_text(re.sub('dataset:.*\n', data, recipe_file.read_text()))
    assert main([str(recipe_file)]) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    assert re.search(r'DataLoader worker \(pid.*\).*(killed|exited).*num_workers', lines[0])


def first_size(recipe: Recipe) -> int:
    """Samples in the first batch: a batch schedule names its own sizes."""
    for component in recipe.algorithms:
        if (schedule := component.kwargs.get('schedule')) is not None:
            return find_schedule(schedule).known_sizes[0]
    return recipe.dataset.batch_size


@pytest.mark.parametrize('path', [path for path, _ in list_recipes(recipe_folder())], ids=lambda path: path.stem)
def test_our_recipes_start(path, tmp_path):
    """Two batches and one of evaluation; small, generated images where the real data may not be here, bytes for a tiny GPT for text."""
    recipe = load_recipe(path, [f'save_folder={tmp_path}', 'progress_bar=false', 'loggers=null'])
    assert recipe.run_name == path.stem
    # compiling takes minutes of processor time, and has tests of its own
    small = {'compile_config': None, 'max_duration': '1ep', 'train_subset_num_batches': 2, 'eval_subset_num_batches': 1, 'loader': None}
    if recipe.dataset.path is not None:
        # a tenth of them, for subset selection, is two batches
        images = {'name': 'synthetic', 'batch_size': 4, 'num_samples': 80, 'eval_samples': 8, 'image_size': 32}
        small['dataset'] = images | {'num_classes': recipe.model.num_classes or 10}
        small['model'] = {**recipe.settings['model'], 'pretrained': False}
    if path.parent.name == 'text':
        text = {'tokenizer': 'bytes', 'vocab_size': None, 'seq_len': 16, 'limit': 320, 'eval_samples': 8, 'num_workers': 0}
        small['dataset'] = recipe.settings['dataset'] | text
        small['model'] = recipe.settings['model'] | {'layers': 1, 'width': 8, 'heads': 1}
    kept = {key: value for key, value in recipe.settings.items() if key not in ('save_interval', 'autoresume')}  # no checkpoints
    recipe = parse_recipe(kept | small)
    trainer = build_trainer(recipe)
    assert len(trainer.state.algorithms) >= len(recipe.algorithms)
    trainer.fit()
    trainer.close()
    (epoch,) = json.loads((tmp_path / recipe.run_name / 'summary.json').read_text())['epochs']
    assert (epoch['batches'], epoch['samples']) == (2, 2 * first_size(recipe))
    assert 0 < epoch['train_loss'] < 100


@pytest.mark.distributed
def test_two_ranks_share_the_batch(recipe_file, tmp_path, launch):
    status, said = launch('-m', 'composer_effalgos.train', str(recipe_file), 'max_duration=1ep', 'algorithms.infobatch={}', ranks=2)
    assert status == 0, said
    written = summary(tmp_path)
    assert written['world_size'] == 2
    assert [(entry['samples'], entry['batches'], entry['batch_size']) for entry in written['epochs']] == [(64, 4, 16)]
    assert sum(line.startswith('small: accuracy') for line in said.splitlines()) == 1


@pytest.mark.distributed
@pytest.mark.parametrize(
    ('override', 'line'),
    [
        ('dataset.batch_size=15', 'dataset.batch_size: expected a multiple of the 2 ranks, got 15'),
        ('optimiser.lr=1', 'optimiser: unknown key'),
    ],
)
def test_two_ranks_refuse_once(recipe_file, override, line, forked):
    """After the ranks have met, and before."""
    status, said = forked('-m', 'composer_effalgos.train', str(recipe_file), override, ranks=2)
    assert status == 2
    assert said.count('error: ') == 1
    assert line in said
    assert 'Traceback' not in said


@pytest.mark.distributed
def test_a_rank_that_fails_alone_says_why_and_the_other_nothing(recipe_file, tmp_path, launch):
    broken = broken_images(recipe_file, tmp_path, 'batch_size: 2')
    start = time.monotonic()
    status, said = launch('-m', 'composer_effalgos.train', str(recipe_file), 'max_duration=1ep', ranks=2)
    assert status in (1, 2)
    assert said.count('error: ') == said.count(str(broken)) == 1
    assert 'Traceback' not in said
    assert time.monotonic() - start < 120


@pytest.mark.distributed
def test_traceback_shows_all(recipe_file, forked):
    status, said = forked('-m', 'composer_effalgos.train', str(recipe_file), 'dataset.batch_size=65', '--traceback')
    assert status == 1
    assert 'Traceback' in said
    assert 'expected at most the' in said
