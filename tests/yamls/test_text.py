"""The recipes of text: those of one group differ in the method alone, and name lengths that can be kept exactly."""

import re

import pytest

from composer_effalgos.recipes.schema import load_recipe
from composer_effalgos.recipes.settings import recipe_folder

FOLDER = recipe_folder() / 'text'
GROUPS = {'python_source_gpt31m_baseline': 'python_source_gpt31m_*.yaml', 'python_source_gpt_cpu': 'python_source_gpt_*cpu.yaml'}
OWN = {'run_name', 'algorithms'}


@pytest.mark.parametrize('baseline', GROUPS)
def test_the_recipes_of_a_group_differ_in_the_method_alone(baseline):
    plain = load_recipe(FOLDER / f'{baseline}.yaml').settings
    others = [load_recipe(path).settings for path in FOLDER.glob(GROUPS[baseline]) if path.stem != baseline]
    assert len(others) >= 4
    for other in others:
        if other['run_name'] == 'python_source_gpt_seesaw_cpu':  # begins at a quarter of the batch, with half of the rate
            assert (other['dataset'].pop('batch_size'), other['optimizer'].pop('lr')) == (4, 1.5e-3)
            other['dataset']['batch_size'], other['optimizer']['lr'] = plain['dataset']['batch_size'], plain['optimizer']['lr']
        assert {key: value for key, value in other.items() if key not in OWN} == {key: plain[key] for key in plain if key not in OWN}


def test_lengths_in_tokens_are_whole_epochs():
    found = 0
    for path in FOLDER.glob('*.yaml'):
        recipe = load_recipe(path)
        if (tokens := re.fullmatch(r'(\d+)tok', str(recipe.max_duration))) is not None:
            options = recipe.dataset.options
            assert int(tokens[1]) % (options['limit'] * options['seq_len']) == 0, path
            found += 1
    assert found == 5
