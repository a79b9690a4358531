import pytest
import torch
from composer.models import ComposerClassifier

from composer_effalgos import AdaBatch
from composer_effalgos.adabatch import NoiseScale


class Small(ComposerClassifier):
    """Takes no more than so many samples at a time, as a device with little memory."""

    def __init__(self, room: int) -> None:
        torch.manual_seed(0)
        super().__init__(torch.nn.Linear(8, 3), num_classes=3)
        self.room, self.calls, self.failures = room, [], 0

    def forward(self, batch):
        self.calls.append(len(batch[0]))
        if len(batch[0]) > self.room:
            self.failures += 1
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate more than there is')
        return super().forward(batch)


def test_falls_back_to_what_fitted_and_loses_no_batch(make_trainer, weights_of):
    model = Small(room=40)
    trainer = make_trainer([AdaBatch(2, '1ep')], model=model, max_duration='4ep')
    with pytest.warns(UserWarning, match='64 samples do not fit on the device; larger batches accumulate .* microbatches of 32'):
        trainer.fit()
    assert model.failures == 1
    assert [epoch[0] for epoch in trainer.recorder.sizes] == [16, 32, 64, 128]  # the batch grows on
    assert [sum(epoch) for epoch in trainer.recorder.sizes] == [203] * 4
    assert trainer.state.device_train_microbatch_size == 32
    assert not trainer.state.auto_microbatching
    first_of_64 = len(trainer.recorder.sizes[0]) + len(trainer.recorder.sizes[1])
    assert model.calls[first_of_64 : first_of_64 + 3] == [64, 32, 32]
    assert max(model.calls[first_of_64 + 1 :]) == 32
    # and it is the training of a device with room enough
    roomy = make_trainer([AdaBatch(2, '1ep')], model=Small(room=1000), max_duration='4ep')
    roomy.fit()
    assert torch.allclose(weights_of(trainer), weights_of(roomy), atol=1e-5)


@pytest.mark.parametrize(('factor', 'room', 'fits'), [(3, 20, 16), (3, 30, 24), (1.5, 17, 16)])
def test_the_last_size_that_fitted_is_never_undercut(make_trainer, factor, room, fits):
    model = Small(room)
    trainer = make_trainer([AdaBatch(factor, '1ep')], model=model, max_duration='3ep')
    with pytest.warns(UserWarning, match=f'over microbatches of {fits}'):
        trainer.fit()
    assert trainer.state.device_train_microbatch_size == fits
    assert max(call for call in model.calls if call <= room) == fits


def test_what_fits_is_remembered_by_a_checkpoint(make_trainer, weights_of, tmp_path):
    whole = make_trainer([AdaBatch(2, '1ep')], model=Small(40), max_duration='4ep', save_folder=str(tmp_path), save_interval='5ba')
    whole.fit()
    model = Small(40)
    resumed = make_trainer([AdaBatch(2, '1ep')], model=model, max_duration='4ep', load_path=str(tmp_path / 'ep3-ba25-rank0.pt'))
    resumed.fit()
    assert model.failures == 0
    assert resumed.state.device_train_microbatch_size == 32
    assert torch.equal(weights_of(resumed), weights_of(whole))


def test_too_little_memory_for_the_first_batch_is_not_ours_to_mend(make_trainer):
    trainer = make_trainer([AdaBatch(2, '1ep')], model=Small(room=8))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        trainer.fit()


def test_an_explicit_microbatch_is_kept(make_trainer):
    model = Small(room=8)
    trainer = make_trainer([AdaBatch(2, '1ep')], model=model, device_train_microbatch_size=8)
    trainer.fit()
    assert set(trainer.recorder.microbatches) == {8}
    assert model.failures == 0


def test_auto_probes_again_after_each_growth(make_trainer):
    """Composer allows 'auto' on a GPU only; what it does then is shown here by setting its switch."""
    model = Small(room=40)
    trainer = make_trainer([AdaBatch(2, '1ep')], model=model, max_duration='5ep')
    trainer.state.auto_microbatching = True
    trainer.fit()
    assert trainer.state.auto_microbatching
    assert model.failures == 1 + 2  # at 64, and at 128 by way of 64
    assert trainer.recorder.microbatches[-1] == 32


def test_measuring_halves_and_memory_get_along(make_trainer):
    model = Small(room=40)
    trainer = make_trainer([AdaBatch(2, policy=NoiseScale(1e-6, '5ba', measure_every=2, decay=0.0))], model=model, max_duration='4ep')
    trainer.fit()
    assert max(epoch[0] for epoch in trainer.recorder.sizes) == 128
    assert trainer.state.device_train_microbatch_size == 32
    assert [sum(epoch) for epoch in trainer.recorder.sizes] == [203] * 4
