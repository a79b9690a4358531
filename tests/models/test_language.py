import json
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

from composer_effalgos.datasets import build_dataset
from composer_effalgos.models.language import build_language_model
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import load_recipe, parse_recipe
from composer_effalgos.recipes.settings import merge_settings
from composer_effalgos.train import summary_line
from composer_effalgos.utils.errors import InputError

pytest.importorskip('transformers', reason='needs transformers')
RECIPE = 'yamls/text/python_source_gpt_cpu.yaml'
SMALL = ['dataset.limit=24', 'dataset.eval_samples=10', 'dataset.eval_batch_size=4', 'max_duration=2ep', 'model.layers=1', 'model.width=16']


def test_the_size_is_what_the_config_says():
    model = build_language_model('gpt2', 256, 128, layers=3, width=64, heads=4)
    block = 12 * 64**2 + 13 * 64
    assert sum(weight.numel() for weight in model.parameters()) == 3 * block + 2 * 64 + (256 + 128) * 64  # head and embedding are one
    tokens = torch.randint(256, (2, 128))
    loss = model.loss(model({'input_ids': tokens, 'labels': tokens}), {'labels': tokens})
    logits = model.model(tokens).logits
    assert torch.allclose(loss, cross_entropy(logits[:, :-1].reshape(-1, 256), tokens[:, 1:].reshape(-1)))


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_recipe_trains_and_its_held_out_loss_is_in_the_summary(tmp_path):
    recipe = load_recipe(RECIPE, [*SMALL, f'save_folder={tmp_path}', 'progress_bar=false', 'algorithms.infobatch.prune_ratio=0.5'])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trainer = build_trainer(recipe)
        trainer.fit()
    assert not [item for item in caught if 'Accuracy' in str(item.message)]
    totals = json.loads((recipe.run_folder / 'summary.json').read_text())['totals']
    tokens = torch.stack([item['input_ids'] for item in build_dataset('python_source', 'eval', eval_samples=10)])
    network = trainer.state.model.model.eval()
    with torch.no_grad():
        expected = cross_entropy(network(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    trainer.close()
    assert totals['eval_accuracy'] is None
    assert totals['eval_loss'] == pytest.approx(float(expected), rel=1e-5)
    assert f'held-out loss {totals["eval_loss"]:.4f} (perplexity {expected.exp():.2f})' in summary_line(recipe)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (['model.layer=2'], r"model\.layer: unknown key; did you mean 'layers'"),
        (['model.seq_len=2'], r'model\.seq_len: unknown key'),
        (['model.layers=0'], r'model\.layers: expected at least 1, got 0'),
        (['model.width=10'], r'model\.width: expected a multiple of the 4 heads, got 10'),
        (['model.dropout=1.0'], r'model\.dropout: expected a number in \[0, 1\), got 1\.0'),
        (['model.pretrained=true'], r'model\.pretrained: unknown argument'),
        (['model.num_classes=100'], r'model\.num_classes: expected at least the 256 classes of the dataset, got 100'),
        (['model={name: resnet20_cifar}'], r'dataset\.name: expected one of images for resnet20_cifar, got python_source'),
        (['dataset={name: digits, batch_size: 8}'], r'dataset\.name: expected one of text \(.*python_source.*\) for gpt2, got digits'),
        (['loader=device'], r'images'),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, overrides, message):
    replaced = {override.partition('=')[0] for override in overrides if '={' in override}
    settings = load_recipe(RECIPE, [f'save_folder={tmp_path}']).settings
    kept = {key: value for key, value in settings.items() if key not in replaced}
    with pytest.raises(InputError, match=message) as caught:
        build_trainer(parse_recipe(merge_settings(RECIPE, kept, overrides, example='seed=1')))
    assert '\n' not in str(caught.value)
