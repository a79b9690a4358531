import json
import threading
from contextlib import contextmanager

import pytest
import torch

from composer_effalgos import InfoBatch

TINY = ['--device', 'cpu', '--samples', '64', '--batch-size', '8', '--epochs', '3', '--repeats', '2']


def test_one_at_a_time_and_the_one_behind_goes_next(script):
    relay = script('infobatch_overhead').Relay(2, lambda: None)
    order = []

    def run(who: int, batches: int) -> None:
        relay.enter(who)
        for batch in range(batches):
            order.append(who)
            relay.batch_done(who, (batch + 1) / batches, 0, batch, 1)
        relay.leave(who)

    threads = [threading.Thread(target=run, args=arguments) for arguments in ((0, 4), (1, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    # after 0, 1, 0 both are half way through, and the same one goes on
    assert order == [0, 1, 0, 0, 1, 0]
    assert [len(turns) for turns in relay.turns] == [4, 2]


def turns(module, *rows):
    return [module.Turn(epoch, batch, samples, seconds, seconds / 2) for epoch, batch, samples, seconds in rows]


def test_step_ratios_worked_by_hand(script):
    module = script('infobatch_overhead')
    plain = turns(module, (0, 0, 4, 9.0), (1, 0, 4, 2.0), (1, 1, 4, 1.0), (1, 2, 4, 1.0), (2, 0, 4, 2.0), (2, 1, 4, 1.0), (2, 2, 4, 1.0))
    ours = turns(module, (0, 0, 4, 1.0), (1, 0, 4, 4.0), (1, 1, 4, 1.1), (1, 2, 4, 1.3), (2, 0, 4, 2.0), (2, 1, 4, 0.9), (2, 2, 4, 1.1))
    found = module.compare_steps(plain, ours)
    assert found['pairs'] == 4
    assert found['step_ratio'] == pytest.approx(1.1)  # of 0.9, 1.1, 1.1, 1.3
    assert (found['step_ratio_low'], found['step_ratio_high']) == pytest.approx((0.9, 1.3))
    assert found['epoch_ratios'] == pytest.approx([6.4 / 4, 4.0 / 4])
    assert found['our_step_seconds'] == pytest.approx(1.1)


def test_savings_worked_by_hand(script):
    module = script('infobatch_overhead')
    plain = turns(module, (0, 0, 100, 50.0), (1, 0, 50, 5.0), (1, 1, 50, 5.0))
    ours = turns(module, (0, 0, 100, 1.0), (1, 0, 50, 6.0), (1, 1, 10, 2.0))
    found = module.compare_savings(plain, ours)
    assert found['saved_samples'] == pytest.approx(0.4)
    assert found['saved_time'] == pytest.approx(0.2)
    assert found['efficiency'] == pytest.approx(0.5)


def test_everything_end_to_end(script, tmp_path, capsys):
    script('infobatch_overhead').main([*TINY, '--out', str(tmp_path)])
    results = json.loads((tmp_path / 'infobatch_overhead_cpu.json').read_text())
    for name in ('control', 'overhead'):
        assert results[name]['pairs'] == 2 * 7  # epochs that count, batches that do not open one
        assert results[name]['step_ratio_low'] <= results[name]['step_ratio'] <= results[name]['step_ratio_high']
    for run in (*results['saving']['runs'], results['saving']):
        assert run['saved_samples'] == pytest.approx(1 - run['samples'][1] / run['samples'][0])
        assert run['efficiency'] == pytest.approx(run['saved_time'] / run['saved_samples'])
    assert [run['samples'][0] for run in results['saving']['runs']] == [2 * 64] * 2
    # of 64 random images some 32 lie below the mean loss, and half of those are dropped in each of two epochs
    assert all(10 < run['samples'][0] - run['samples'][1] < 55 for run in results['saving']['runs'])
    hooks = {hook['hook']: hook['calls'] for hook in results['hooks']['hooks']}
    assert hooks == dict.fromkeys(hooks, results['hooks']['steps'])
    assert {'scores', 'weighted loss', 'plan: before_train_batch'} <= set(hooks)
    assert results['synchronisation'] is None
    text = (tmp_path / 'infobatch_overhead_cpu.md').read_text()
    assert f'{results["saving"]["efficiency"]:.3f}' in text
    assert text in capsys.readouterr().out


def test_the_pruned_training_saves_what_infobatch_says(script):
    module = script('infobatch_overhead')
    settings = module.Settings('cpu', 'resnet20_cifar', 96, 16, 3, 1, 'fp32', 17)
    algorithm = InfoBatch(prune_ratio=0.5, delta=1.0)
    plain, ours = module.race(settings, [[], [algorithm]])
    assert sum(turn.samples for turn in plain) == 3 * 96
    assert sum(turn.samples for turn in plain) - sum(turn.samples for turn in ours) == algorithm.samples_saved > 0
    assert [(turn.epoch, turn.batch) for turn in plain] == [(epoch, batch) for epoch in range(3) for batch in range(6)]
    assert all(turn.seconds > 0 for turn in (*plain, *ours))


def test_an_error_in_one_training_ends_the_race(script):
    module = script('infobatch_overhead')
    settings = module.Settings('cpu', 'resnet20_cifar', 32, 16, 2, 1, 'fp32', 17)

    def broken(outputs, batch):
        raise RuntimeError('broken loss')

    with pytest.raises(RuntimeError, match='broken loss'):
        module.race(settings, [[], [InfoBatch(per_sample_loss=broken)]])


def test_what_happens_around_a_hook_reaches_the_training(script):
    """The sync-debug mode acts so: an error raised around a hook stops the run."""
    module = script('infobatch_overhead')
    settings = module.Settings('cpu', 'resnet20_cifar', 32, 16, 2, 1, 'fp32', 17)
    for hook in ('scores', 'weighted loss', *(f'plan: {name}' for name in module.STEP_HOOKS)):
        trainer = module.make_trainer(settings, [InfoBatch()])

        @contextmanager
        def refuse(name, hook=hook):
            if name == hook:
                raise RuntimeError(f'in {hook}')
            yield

        module.wrap_hooks(trainer, refuse)
        with pytest.raises(RuntimeError, match=f'in {hook}'):
            trainer.fit()
        trainer.close()


@pytest.mark.gpu
def test_no_hook_waits_for_the_gpu_and_one_that_does_is_found(script):
    module = script('infobatch_overhead')
    settings = module.Settings('gpu', 'resnet20_cifar', 128, 16, 2, 1, 'amp_bf16', 17)
    assert module.check_synchronisation(settings)['guarded_calls'] > 50

    def waits(outputs, batch):
        losses = torch.nn.functional.cross_entropy(outputs, batch[1], reduction='none')
        return losses * (1.0 if losses.sum().item() > 0 else 2.0)

    trainer = module.make_trainer(settings, [InfoBatch(per_sample_loss=waits)])

    @contextmanager
    def guard(name):
        torch.cuda.set_sync_debug_mode('error')
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode('default')

    module.wrap_hooks(trainer, guard)
    with pytest.raises(RuntimeError, match='synchroniz'):
        trainer.fit()
