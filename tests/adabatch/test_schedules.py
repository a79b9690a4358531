import itertools
import math
from pathlib import Path

import pytest
from composer.core import DataSpec, Time, TimeUnit
from composer.optim import LinearScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from composer_effalgos import AdaBatch, InputError
from composer_effalgos.adabatch import Progress, parse_steps, ramp


class StepRule:
    """Megatron-LM's rule for --step-batch-size-schedule: samples, or tokens turned into samples."""

    def __init__(self, entries, sequence_length=None):
        self.entries = [(threshold // (sequence_length or 1), size) for threshold, size in entries]

    def __call__(self, samples):
        return [size for threshold, size in self.entries if samples >= threshold][-1]


class RampRule:
    """Megatron-LM's rule for --rampup-batch-size START INCREMENT SAMPLES with --global-batch-size."""

    def __init__(self, start, increment, over, stop):
        self.start, self.increment, self.over, self.stop = start, increment, over, stop

    def __call__(self, samples):
        if samples > self.over:
            return self.stop
        each = self.over / ((self.stop - self.start) // self.increment)
        return self.start + int(samples / each) * self.increment


class EqualUpdatesRule:
    """ModernBERT's rule, in microbatches on each of several ranks, by the tokens of one rank."""

    def __init__(self, low, high, tokens, ranks):
        self.low, self.high, self.tokens = low, high, math.ceil(tokens / ranks)

    def __call__(self, tokens_of_a_rank):
        if tokens_of_a_rank >= self.tokens:
            return self.high
        share = self.tokens / sum(range(self.low, self.high))
        size, before = self.low, 0
        while size < self.high:
            before += size
            if tokens_of_a_rank < math.ceil(share * before):
                return size
            size += 1
        return self.high


@pytest.mark.parametrize(
    ('schedule', 'rule', 'sequence_length', 'end'),
    [
        # examples/gpt3/train_gpt3_175b_distributed.sh, and the same as it stood there before April 2026
        (
            '0:16 2.4Btok:320 4.8Btok:624 7.2Btok:928 9.6Btok:1232 12Btok:1536',
            StepRule([(0, 16), (2400000000, 320), (4800000000, 624), (7200000000, 928), (9600000000, 1232), (12000000000, 1536)], 2048),
            2048,
            6_500_000,
        ),
        ({'start': 16, 'increment': 16, 'stop': 1536, 'over': '5859375sp'}, RampRule(16, 16, 5859375, 1536), 2048, 6_500_000),
        # BLOOM's
        ({'start': 192, 'increment': 16, 'stop': 2048, 'over': '9765625sp'}, RampRule(192, 16, 9765625, 2048), 2048, 10_000_000),
        # the example in Megatron-LM's documentation, with sequences of 8192 tokens, and in samples
        (
            '0:768 250Btok:1536 500Btok:3072 750Btok:6144',
            StepRule([(0, 768), (250 * 10**9, 1536), (500 * 10**9, 3072), (750 * 10**9, 6144)], 8192),
            8192,
            100_000_000,
        ),
        ('0:768 30517578sp:1536', StepRule([(0, 768), (30517578, 1536)]), 8192, 40_000_000),
    ],
    ids=['GPT-3 steps', 'GPT-3 ramp', 'BLOOM', 'documentation', 'samples'],
)
def test_megatrons_published_schedules(schedule, rule, sequence_length, end):
    ours = AdaBatch(schedule=schedule, global_sizes=True).policy
    samples, seen = 0, set()
    while samples < end:
        size = rule(samples)
        assert ours(Progress(0, 0, samples, samples * sequence_length)) == size, samples
        samples += size
        seen.add(size)
    assert seen == set(ours.known_sizes)


@pytest.mark.parametrize(
    ('micro', 'size', 'tokens'), [(96, 576, 50 * 10**9), (56, 616, 10 * 10**9)], ids=['base: 768 to 4608', 'large: 448 to 4928']
)
def test_modernberts_published_ramps(micro, size, tokens):
    """On 8 GPUs, by device microbatches of sequences of 1024 tokens."""
    ours = AdaBatch(schedule={'start': micro, 'increment': micro, 'stop': size, 'over': f'{tokens}tok', 'equal': 'updates'}).policy
    rule, seen, updates = EqualUpdatesRule(1, size // micro, tokens, 8), 0, {}
    while seen < 1.1 * tokens / 8:
        expected = micro * rule(seen)
        assert ours(Progress(0, 0, 0, 8 * seen)) == expected
        updates[expected] = updates.get(expected, 0) + 1
        seen += expected * 1024
    counts = list(updates.values())[:-1]
    assert max(counts) - min(counts) <= 1  # equally many updates at each size


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 30), st.integers(1, 10**6), st.integers(0, 10**6))
def test_any_linear_ramp(start, increment, steps, over, samples):
    stop = start + increment * steps
    ours = ramp(start, stop, f'{over}sp', increment)
    assert ours(Progress(0, 0, samples)) == start + increment * min(steps, samples * steps // over)
    down = ramp(stop, start, f'{over}sp', increment)
    assert down(Progress(0, 0, samples)) == stop - increment * min(steps, samples * steps // over)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 10**6), st.integers(1, 4), st.data())
def test_any_ramp_of_equal_updates(low, more, tokens, ranks, data):
    ours = ramp(low, low + more, f'{tokens * ranks}tok', equal='updates')
    seen = data.draw(st.integers(0, tokens + 2))
    total, before = sum(range(low, low + more)), 0
    expected = low + more
    for size in range(low, low + more):  # exactly, where ModernBERT's floats may be off by one token
        before += size
        if seen * total < tokens * before:
            expected = size
            break
    assert ours(Progress(0, 0, 0, seen * ranks)) == expected


def test_times_in_every_unit():
    ours = parse_steps('0:8, 1ep:16, 100ba:24, 2Ksp:32, 1.5mtok:40, 0.75dur:48')
    assert [time.to_timestring() for time in ours.times[1:]] == ['1ep', '100ba', '2000sp', '1500000tok', '0.75dur']
    at = {'epoch': 0, 'batch': 0, 'sample': 0, 'token': 0, 'share': 0.0}
    for size, now in enumerate(({}, {'epoch': 1}, {'batch': 100}, {'sample': 2000}, {'token': 1500000}, {'share': 0.75 - 1e-12}), 1):
        assert ours(Progress(**{**at, **now})) == 8 * size
    assert ours(Progress(5, 99, 1999, 1499999, 0.7)) == 16
    assert ours(Progress(0, 99, 0, 1500000, 0.7)) == 40  # the last in the list whose time has come
    assert ramp(8, 16, '0.5dur', 4)(Progress(0, 0, 0, 0, 0.25)) == 12
    assert ramp(8, 16, '3ep', 4)(Progress(1, 0, 0)) == 8
    assert ramp(8, 16, Time(3, TimeUnit.EPOCH), 4)(Progress(2, 0, 0)) == 12


@pytest.mark.parametrize(
    ('schedule', 'message'),
    [
        ('', r"^schedule: expected '0:32 1ep:64 "),
        ('32', r"^schedule: entry 1 \('32'\): expected TIME:SIZE"),
        ('0:32 1ep64', r"^schedule: entry 2 \('1ep64'\): expected TIME:SIZE"),
        ('0:32 1ep:6o', r"^schedule: entry 2 \('1ep:6o'\): expected TIME:SIZE"),
        ('0:32 1ep:-4', r'^schedule: entry 2 .* expected TIME:SIZE'),
        ('0:32 1ep:64.0', r'^schedule: entry 2 .* expected TIME:SIZE'),
        ('0:0', r'^schedule: entry 1 .* expected a batch size from 1 to 1000000000, got 0'),
        ('0:32 1ep:' + '9' * 5000, r'^schedule: entry 2 .* expected a batch size from 1'),
        ('1ep:64', r"^schedule: entry 1 \('1ep:64'\): expected the first time to be 0, got '1ep'; write '0:SIZE 1ep:64'"),
        ('0:32 1ep:64 1ep:96', r"^schedule: entry 3 \('1ep:96'\): expected a time after 1ep, got 1ep; times must ascend"),
        ('0:32 2ktok:64 1ep:80 1999tok:96', r'^schedule: entry 4 .* expected a time after 2ktok, got 1999tok'),
        ('0:32 5:64', r"^schedule: entry 2 \('5:64'\): expected a time above 0 in ep, ba, sp, tok, dur .* got '5'"),
        ('0:32 5x:64', r"^schedule: entry 2 .* got '5x'"),
        ('0:32 5Gtok:64', r"^schedule: entry 2 .* got '5Gtok'"),
        ('0:32 5s:64', r"^schedule: entry 2 .* got '5s'"),
        ('0:32 0ep:64', r"^schedule: entry 2 .* got '0ep'"),
        ('0:32 -1ep:64', r"^schedule: entry 2 .* got '-1ep'"),
        ('0:32 2dur:64', r"^schedule: entry 2 .* \(at most 1dur\), .* got '2dur'"),
        ('0:32 nanep:64', r"^schedule: entry 2 .* got 'nanep'"),
        (7, r'^schedule: expected .*, got 7'),
        ({'start': 32}, r"^schedule.stop: missing; as in \{'start': 32"),
        ({'start': 32, 'stop': 64, 'over': '1ep', 'incr': 2}, r'^schedule.incr: expected one of start, stop, over, increment, equal'),
        ({'start': 32, 'stop': 64, 'over': '1ep', 'increment': 5}, r'^schedule.increment: expected a divisor of stop - start = 32, got 5'),
        ({'start': 32, 'stop': 32, 'over': '1ep'}, r'^schedule.increment: expected a divisor'),
        ({'start': 0, 'stop': 32, 'over': '1ep'}, r'^schedule.start: expected a whole number'),
        ({'start': 1, 'stop': 10**9, 'over': '1ep'}, r'^schedule.increment: expected at most 100000 steps'),
        ({'start': 32, 'stop': 64, 'over': 'soon'}, r'^schedule.over: expected a time'),
        ({'start': 32, 'stop': 64, 'over': '1.5dur'}, r"^schedule.over: expected a share of the run of at most '1dur', got '1.5dur'"),
        ({'start': 32, 'stop': 64, 'over': '1ep', 'equal': 'steps'}, r"^schedule.equal: expected 'samples'"),
    ],
)
def test_mistakes_are_named_with_their_place(schedule, message):
    with pytest.raises(InputError, match=message) as caught:
        AdaBatch(schedule=schedule)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'milestones': ['1ep']}, '^milestones: expected none with schedule'),
        ({'interval': '1ep'}, '^interval: expected none with schedule'),
        ({'growth_factor': 3}, '^growth_factor: expected none with schedule'),
        ({'policy': lambda progress: 0}, '^policy: expected none with schedule'),
        ({'lr_factor': 0.5}, '^lr_factor: expected none with schedule.* give lr'),
        ({'max_batch_size': 40}, '^max_batch_size: expected at least the 64 of the schedule, got 40'),
        ({'lr': 'cubic'}, "^lr: expected one of 'none', 'sqrt', 'linear', 'auto', got 'cubic'"),
        ({'beta2': True}, "^beta2: expected 'keep' or 'rescale'"),
    ],
)
def test_what_stands_in_each_others_place(arguments, message):
    with pytest.raises(InputError, match=message):
        AdaBatch(schedule='0:32 1ep:64', **arguments)


def test_one_learning_rate_rule_and_global_sizes_of_a_schedule():
    with pytest.raises(InputError, match=r'^lr_factor: expected none with lr'):
        AdaBatch(lr='sqrt', lr_factor=0.5)
    with pytest.raises(InputError, match=r'^global_sizes: expected a schedule'):
        AdaBatch(global_sizes=True)


def test_sizes_that_the_data_set_does_not_have(make_trainer):
    with pytest.raises(InputError, match=r'^schedule: size 2: expected at most 203, with 203 samples in the dataset, got 204'):
        make_trainer([AdaBatch(schedule='0:16 9ep:204')], max_duration='1ep').fit()


@pytest.mark.parametrize('schedule', ['0:8 1ep:32', lambda progress: 32 if progress.batch < 3 else 8], ids=['string', 'function'])
def test_batches_that_are_too_small_for_a_scheduler_that_counts_them(make_trainer, schedule):
    def make(**arguments):
        return make_trainer([AdaBatch(schedule=schedule)], max_duration='2ep', **arguments)

    with pytest.raises(InputError, match=r"^schedule: expected sizes of at least the DataLoader's 16 per rank with OneCycleLR.*, got 8;"):
        make(scheduler_of=lambda o: OneCycleLR(o, 0.1, total_steps=26), step_schedulers_every_batch=True).fit()
    make(scheduler_of=lambda o: OneCycleLR(o, 0.1, total_steps=52), step_schedulers_every_batch=True, batch_size=8).fit()
    make(schedulers=LinearScheduler()).fit()


def test_says_what_it_is():
    assert repr(AdaBatch(schedule='0:32, 2ktok:64')) == "AdaBatch(schedule='0:32 2000tok:64', lr=None, global_sizes=False)"
    assert '...' in repr(AdaBatch(schedule={'start': 1, 'stop': 200, 'over': '1Mtok'}))


def flat(nested):
    return [size for epoch in nested for size in epoch]


def test_grows_and_shrinks_at_the_very_batch(make_trainer, weights_of):
    trainer = make_trainer([AdaBatch(schedule='0:8 3ba:20 6ba:4 1ep:32')], max_duration='2ep')
    trainer.fit()
    sizes = trainer.recorder.sizes
    assert sizes[0][:7] == [8] * 3 + [20] * 3 + [4]
    assert set(sizes[0][7:-2]) == {4}
    assert sizes[1][:5] == [32] * 5
    assert [sum(epoch) for epoch in sizes] == [203] * 2
    assert trainer.recorder.microbatches[0] == 8  # although the loader's batches are of 16
    assert trainer.state.device_train_microbatch_size == 32
    growing = make_trainer([AdaBatch(2, milestones=['5ba'])], max_duration='1ep')
    growing.fit()
    scheduled = make_trainer([AdaBatch(schedule=lambda progress: 16 if progress.batch < 5 else 32)], max_duration='1ep')
    scheduled.fit()
    assert growing.recorder.sizes == scheduled.recorder.sizes
    assert (weights_of(growing) == weights_of(scheduled)).all()


@pytest.mark.parametrize('workers', [0, 1])
def test_a_batch_that_shrinks_unforeseen_loses_no_sample(make_trainer, problem, tmp_path, workers):
    """Composer reads an epoch's number of batches before its first batch; it then has more."""

    def run(**arguments):
        trainer = make_trainer([AdaBatch(schedule='0:50 600tok:10 2500tok:40')], max_duration='2ep', **arguments)
        loader = DataLoader(problem, 16, shuffle=True, num_workers=workers)
        trainer.fit(train_dataloader=DataSpec(loader, get_num_tokens_in_batch=lambda batch: 10 * len(batch[1])))
        assert trainer.state.dataloader_len == len(trainer.recorder.sizes[-1]) or 'load_path' in arguments
        return trainer

    saved = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_filename': 'ba{batch}.pt', 'save_num_checkpoints_to_keep': -1}
    whole = run(**saved)
    sizes = whole.recorder.sizes
    assert [sum(epoch) for epoch in sizes] == [203, 203]
    assert sizes[0][:10] == [50, 50] + [10] * 8
    assert (10, 40) in list(itertools.pairwise(sizes[1]))
    for batch in (1, 2, 3, len(sizes[0]) - 1, len(sizes[0]) + 2):
        assert flat(run(load_path=str(tmp_path / f'ba{batch}.pt')).recorder.sizes) == flat(sizes)[batch:]


@pytest.mark.parametrize('workers', [0, 2])
def test_every_step_of_a_token_ramp_after_a_resume_at_any_step(make_trainer, problem, tmp_path, workers):
    """Sequences of 10 tokens each: the batch size follows from the tokens seen, at every step."""
    schedule = {'start': 2, 'stop': 12, 'increment': 2, 'over': '800tok', 'equal': 'updates'}
    rule = EqualUpdatesRule(1, 6, 800, 1)
    expected, tokens = [], 0
    while sum(expected) < 203 - 24:
        expected.append(2 * rule(tokens))
        tokens += 10 * expected[-1]

    def run(**arguments):
        trainer = make_trainer([AdaBatch(schedule=schedule)], max_duration='1ep', **arguments)
        loader = DataLoader(problem, 4, shuffle=True, num_workers=workers)
        trainer.fit(train_dataloader=DataSpec(loader, get_num_tokens_in_batch=lambda batch: 10 * len(batch[1])))
        return flat(trainer.recorder.sizes)

    saved = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_filename': 'ba{batch}.pt', 'save_num_checkpoints_to_keep': -1}
    whole = run(**saved)
    assert whole[: len(expected)] == expected
    assert len(set(expected)) == 6
    assert sum(whole) == 203
    for batch in range(1, len(whole), 4 if workers else 1):
        assert run(load_path=str(tmp_path / f'ba{batch}.pt')) == whole[batch:]


@pytest.mark.distributed
@pytest.mark.parametrize('workers', [0, 1])
def test_over_two_ranks_and_after_a_resume_at_any_step(forked, workers):
    script = Path(__file__).parents[1] / 'scripts' / 'schedules_over_ranks.py'
    status, said = forked(str(script), '--workers', str(workers), ranks=2)
    assert status == 0, said[-4000:]


@pytest.mark.parametrize(('name', 'value'), [('lr_factor', 1.5), ('growth_factor', 7)])
def test_a_policy_that_gives_sizes_takes_no_factors(name, value):
    with pytest.raises(InputError, match=f'^{name}: expected none with policy NormTest, which gives the batch sizes itself'):
        AdaBatch(policy='norm_test', **{name: value})
