import json

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from composer_effalgos.recipes.build import build_split, build_trainer
from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.recipes.settings import recipe_folder


def test_each_sample_has_the_loss_of_a_model_that_did_not_train_on_it(script, tmp_path, capsys):
    module = script('irreducible')
    recipe = recipe_folder() / 'digits' / 'digits_baseline.yaml'
    settings = ['max_duration=1ep', 'dataset.limit=48', 'dataset.batch_size=16', 'model.name=resnet20_cifar', 'progress_bar=false']
    out, runs = tmp_path / 'irreducible.npy', tmp_path / 'runs'
    assert module.main([str(recipe), *settings, '--out', str(out), '--runs', str(runs)]) == 0
    assert capsys.readouterr().out.startswith(f'{out}: 48 losses')
    losses = torch.from_numpy(np.load(out))
    cost = json.loads((tmp_path / 'irreducible.npy.cost.json').read_text())
    assert (cost['samples'], cost['steps']) == (48, 4)
    assert cost['cpu_seconds'] > 0

    first, second = module.halves(48, 0)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(48))
    trainer = build_trainer(
        load_recipe(
            recipe, [*settings, f'save_folder={tmp_path}', f'algorithms.subset_selection={{strategy: file, path: {runs}/half0.parquet}}']
        )
    )
    trainer.fit()
    data = build_split(load_recipe(recipe, [*settings, 'dataset.augment=false']), 'train')
    images, labels = zip(*(data[index] for index in second.tolist()), strict=True)
    model = trainer.state.model.eval()
    with torch.no_grad():
        expected = cross_entropy(model.module(torch.stack(images)), torch.tensor(labels), reduction='none')
    trainer.close()
    assert torch.allclose(losses[second], expected, atol=1e-5)


def test_bad_input_is_one_line(script, tmp_path, capsys):
    assert script('irreducible').main(['nowhere.yaml', '--runs', str(tmp_path)]) == 2
    assert capsys.readouterr().err.count('\n') == 1
