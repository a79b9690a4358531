import copy

import pytest
import torch
from composer.models import ComposerClassifier

from composer_effalgos import InfoBatch
from composer_effalgos.models import autocast
from composer_effalgos.models.autocast import autocast_forward
from composer_effalgos.models.language import build_language_model, build_text_classifier


def classifier() -> ComposerClassifier:
    torch.manual_seed(0)
    return ComposerClassifier(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)), num_classes=3)


def test_forward_is_that_of_torch_autocast_and_the_loss_is_in_fp32(problem):
    batch = [problem.tensors[0][:32], problem.tensors[1][:32]]
    plain, ours = classifier(), classifier()
    autocast_forward(ours)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = plain(batch)
    assert expected.dtype == torch.bfloat16
    outputs = ours(batch)
    assert outputs.dtype == torch.float32
    assert torch.equal(outputs, expected.float())
    assert not torch.equal(outputs, plain(batch))
    assert torch.equal(ours.eval_forward(batch), outputs)
    ours.loss(outputs, batch).backward()
    assert {parameter.grad.dtype for parameter in ours.parameters()} == {torch.float32}


@pytest.mark.parametrize('name', ['gpt2', 'hf_sequence_classification'])
def test_metrics_of_text_models_are_in_fp32(name):
    """Equal to the metrics of the same bfloat16 logits in float64; the training outputs stay as they are."""
    torch.manual_seed(0)
    labels = tokens = torch.randint(0, 128, (48, 64))
    if name == 'gpt2':
        model = build_language_model('gpt2', 128, 64, layers=1, width=32)
    else:
        config = {'n_layer': 1, 'n_embd': 32, 'n_head': 2}
        model = build_text_classifier(name, 5, 64, 128, pretrained_model_name_or_path='gpt2', config_overrides=config)
        labels = torch.randint(0, 5, (48,))
    autocast_forward(model)
    model.eval()

    def batch() -> dict[str, torch.Tensor]:
        return {'input_ids': tokens.clone(), 'labels': labels.clone()}

    with torch.no_grad():
        trained = model(batch())
        assert trained['logits'].dtype == torch.bfloat16
        logits = trained['logits'].double()
        for outputs in (None, trained):
            evaluated = batch()
            found = model.eval_forward(evaluated, outputs)
            assert found.dtype == torch.float32
            assert torch.equal(found.double(), logits)
            for key, metric in model.get_metrics(is_train=False).items():
                metric.reset()
                model.update_metric(evaluated, found, metric)
                if key.endswith('CrossEntropy'):
                    scored, right = (logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()) if name == 'gpt2' else (logits, labels)
                    expected = torch.nn.functional.cross_entropy(scored, right).item()
                    assert metric.compute().item() == pytest.approx(expected, abs=1e-5)
        assert trained['logits'].dtype == torch.bfloat16


def test_a_copy_runs_on_its_own_weights(problem):
    batch = [problem.tensors[0][:4], problem.tensors[1][:4]]
    model = classifier()
    autocast_forward(model)
    other = copy.deepcopy(model)
    before = model(batch)
    with torch.no_grad():
        other.module[2].bias += 1
    assert torch.equal(model(batch), before)
    assert torch.equal(other.eval_forward(batch), other(batch))
    assert not torch.equal(other(batch), before)


def test_scores_are_within_bf16_rounding_and_a_resumed_run_keeps_the_same_samples(make_trainer, weights_of, tmp_path):
    def trained(bf16: bool, **arguments):
        algorithm, model = InfoBatch(), classifier()
        if bf16:
            autocast_forward(model)
        trainer = make_trainer([algorithm], model=model, max_duration='4ep', **arguments)
        trainer.fit()
        return trainer, algorithm

    trainer, algorithm = trained(True, save_folder=str(tmp_path), save_interval='1ba', save_num_checkpoints_to_keep=-1)
    assert algorithm.samples_saved > 0
    resumed, other = trained(True, load_path=str(tmp_path / 'ep2-ba31-rank0.pt'))
    assert torch.equal(weights_of(trainer), weights_of(resumed))
    assert torch.equal(algorithm.scores, other.scores)

    def first_scores(bf16: bool) -> torch.Tensor:
        algorithm, model = InfoBatch(), classifier()
        if bf16:
            autocast_forward(model)
        make_trainer([algorithm], model=model, max_duration='1ep', lr=0.0).fit()
        return algorithm.scores

    assert (first_scores(True) - first_scores(False)).abs().max() < 2**-7  # bfloat16 has 8 bits of precision; losses are about 1


@pytest.mark.parametrize('supported', [True, False])
def test_recipes_use_it_where_the_cpu_has_bf16(supported, monkeypatch, caplog, tmp_path):
    from composer_effalgos.recipes import build
    from composer_effalgos.recipes.schema import parse_recipe

    monkeypatch.setattr(build, 'has_bf16', lambda: supported)
    recipe = parse_recipe(
        {
            'dataset': {'name': 'synthetic', 'batch_size': 8, 'num_samples': 16},
            'model': {'name': 'resnet20_cifar'},
            'optimizer': {'name': 'sgd', 'lr': 0.1},
            'max_duration': '1ep',
            'precision': 'amp_bf16',
            'save_folder': str(tmp_path),
            'progress_bar': False,
        }
    )
    trainer = build.build_trainer(recipe)
    assert isinstance(trainer.state.model.forward, autocast._AutocastForward) == supported
    assert ('AVX-512 BF16' in caplog.text) != supported
    trainer.close()


def test_compiled_once_for_all_epochs_and_last_batches(make_trainer):
    """Epochs of many lengths, and a growing batch, reuse two compiled graphs: one for the first size, one for any size."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    from composer_effalgos import AdaBatch

    model = classifier()
    autocast_forward(model)
    graphs = []
    trainer = make_trainer([InfoBatch(), AdaBatch(2.0, '3ep')], model=model, max_duration='10ep', compile_config={'backend': 'aot_eager'})
    trainer.fit(duration='2ep')
    graphs.append(counters['stats']['unique_graphs'])
    trainer.fit(duration='8ep')
    graphs.append(counters['stats']['unique_graphs'])
    sizes = {size for epoch in trainer.recorder.sizes for size in epoch}
    assert len(sizes) > 5
    assert graphs == [2, 2]
