"""Models of Hugging Face's in recipes: by name from scratch, from a folder, and what does not fit."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy

from composer_effalgos.models.language import build_language_model, build_text_classifier
from composer_effalgos.recipes.build import build_trainer
from composer_effalgos.recipes.schema import parse_recipe
from composer_effalgos.utils.errors import InputError

transformers = pytest.importorskip('transformers', reason='needs transformers')
TINY = {'n_layer': 1, 'n_embd': 16, 'n_head': 2}
LLAMA = {'num_hidden_layers': 1, 'hidden_size': 16, 'intermediate_size': 32, 'num_attention_heads': 2, 'num_key_value_heads': 1}
BERT = {'num_hidden_layers': 1, 'hidden_size': 16, 'intermediate_size': 32, 'num_attention_heads': 2}


def causal(name='gpt2', overrides=TINY, **options):
    return build_language_model('hf_causal_lm', 100, 8, pretrained_model_name_or_path=name, config_overrides=overrides, **options)


def classifier(name='bert', overrides=BERT, **options):
    return build_text_classifier(
        'hf_sequence_classification', 3, 8, 100, pretrained_model_name_or_path=name, config_overrides=overrides, **options
    )


@pytest.mark.parametrize(
    ('name', 'overrides'), [('gpt2', TINY), ('llama', LLAMA), ('gpt_neox', BERT), ('bert', {**BERT, 'is_decoder': True})]
)
def test_any_causal_model_by_name(name, overrides):
    model = causal(name, overrides)
    assert isinstance(model.model, transformers.PreTrainedModel)
    assert model.config.vocab_size == 100
    tokens = torch.randint(100, (2, 8))
    model.eval()
    loss = model.loss(model({'input_ids': tokens, 'labels': tokens}), {'labels': tokens})
    expected = cross_entropy(model.model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(loss, expected)


def test_the_data_set_or_the_recipe_says_the_vocabulary_and_the_model_may_have_more():
    assert causal().config.vocab_size == 100
    assert causal(overrides={**TINY, 'vocab_size': 128}).config.vocab_size == 128
    assert causal().config.eos_token_id is None, "not GPT-2's 50256, which is beyond the vocabulary"


@pytest.mark.parametrize(('name', 'overrides'), [('bert', BERT), ('gpt2', TINY), ('llama', LLAMA), ('roberta', BERT)])
def test_any_classifier_of_texts_by_name(name, overrides):
    model = classifier(name, overrides).eval()
    tokens, labels = torch.randint(1, 100, (4, 8)), torch.tensor([0, 2, 1, 1])
    batch = {'input_ids': tokens, 'labels': labels}
    logits = model.model(tokens).logits
    assert logits.shape == (4, 3)
    assert torch.allclose(model.loss(model(batch), batch), cross_entropy(logits, labels))
    assert set(model.get_metrics()) == {'CrossEntropy', 'MulticlassAccuracy'}


def test_weights_come_from_a_folder(tmp_path):
    saved = causal()
    saved.model.save_pretrained(tmp_path / 'lm')
    loaded = causal(str(tmp_path / 'lm'), None, pretrained=True)
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in loaded.state_dict().items())
    scratch = causal(str(tmp_path / 'lm'), {'n_layer': 2})
    assert scratch.config.n_layer == 2
    assert not torch.equal(scratch.model.lm_head.weight, saved.model.lm_head.weight)
    # a classifier takes the body, its last layer starts anew
    body = classifier(str(tmp_path / 'lm'), None, pretrained=True).model
    assert torch.equal(body.transformer.h[0].mlp.c_fc.weight, saved.model.transformer.h[0].mlp.c_fc.weight)
    assert body.score.weight.shape == (3, 16)


def test_a_folder_with_other_or_no_weights_is_refused(tmp_path):
    causal().model.save_pretrained(tmp_path / 'lm')
    classifier().model.save_pretrained(tmp_path / 'bert')
    config = json.loads((tmp_path / 'bert' / 'config.json').read_text()) | {'is_decoder': True}
    (tmp_path / 'bert' / 'config.json').write_text(json.dumps(config))
    for folder, overrides, message in (
        ('lm', {'n_layer': 2}, r'model\.pretrained: .*the weights are of another model: transformer\.h\.1'),
        ('lm', {'n_embd': 32}, r'model\.pretrained: '),
        ('bert', None, r'model\.pretrained: .*of another model: cls\.predictions'),
    ):
        with pytest.raises(InputError, match=message) as caught:
            causal(str(tmp_path / folder), overrides, pretrained=True)
        assert '\n' not in str(caught.value)
    (tmp_path / 'lm' / 'model.safetensors').write_bytes(b'cut off')
    with pytest.raises(InputError, match=r'model\.pretrained: '):
        causal(str(tmp_path / 'lm'), None, pretrained=True)
    (tmp_path / 'lm' / 'config.json').write_text('{')
    with pytest.raises(InputError, match='the configuration cannot be read'):
        causal(str(tmp_path / 'lm'))


@pytest.mark.parametrize(
    ('build', 'name', 'options', 'message'),
    [
        (causal, 'gpt-2', {}, r"name_or_path: expected a folder or the name of a configuration.*got 'gpt-2'; did you mean 'gpt2'\?"),
        (causal, 'meta-llama/Llama-3.2-1B', {}, r"got 'meta-llama/Llama-3\.2-1B'"),
        (causal, 'gpt2', {'overrides': {'n_layers': 2}}, r"model\.config_overrides\.n_layers: unknown key; did you mean 'n_layer'"),
        (
            causal,
            'gpt2',
            {'overrides': {'n_positions': 4}},
            r'config_overrides\.n_positions: expected at least 8 for this data, got 4',
        ),
        (causal, 'gpt2', {'overrides': {'vocab_size': 99}}, r'model\.config_overrides\.vocab_size: expected at least 100'),
        (causal, 'gpt2', {'overrides': {**TINY, 'n_head': 3}}, r'model\.config_overrides: .*divisible'),
        (
            causal,
            'gpt2',
            {'pretrained': True},
            r"model\.pretrained: .* a folder that holds weights, got 'gpt2'; nothing is downloaded",
        ),
        (causal, 'gpt2', {'pretrained': 'folder'}, r'model\.pretrained: expected (true|a boolean|bool)'),
        (causal, 'vit', {'overrides': None}, r'vit has no model for this task'),
        (causal, 'bert', {'overrides': BERT}, r'bert sees the tokens that it should predict; set model\.config_overrides\.is_decoder=true'),
        (classifier, 'mamba', {'overrides': {'num_hidden_layers': 1, 'hidden_size': 16}}, r'mamba has no model for this task'),
    ],
)
def test_what_does_not_fit_is_one_line(build, name, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build(name, **options)
    assert '\n' not in str(caught.value)


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_classifier_of_texts_trains_and_is_pruned(tmp_path):
    settings = {
        'run_name': 'packages',
        'max_duration': '4ep',
        'save_folder': str(tmp_path),
        'progress_bar': False,
        'dataset': {'name': 'python_packages', 'batch_size': 16, 'seq_len': 32, 'num_packages': 3, 'limit': 96, 'eval_samples': 30},
        'model': {'name': 'hf_sequence_classification', 'pretrained_model_name_or_path': 'bert', 'config_overrides': BERT},
        'optimizer': {'name': 'adamw', 'lr': 0.01},
        'algorithms': {'infobatch': {'prune_ratio': 0.5, 'delta': 0.75}},
    }
    trainer = build_trainer(parse_recipe(settings))
    trainer.fit()
    scores = trainer.state.algorithms[0].scores
    trainer.close()
    totals = json.loads((tmp_path / 'packages' / 'summary.json').read_text())['totals']
    assert scores.shape == (96,)  # one a text
    assert 0.1 < totals['saved_fraction'] < 0.4
    assert 0 <= totals['eval_accuracy'] <= 1
    assert 0 < totals['eval_loss'] < 10
    for data, model, message in (
        ('python_source', settings['model'], r'dataset\.name: expected one of text with classes \(python_packages\) for hf_sequence'),
        ('python_packages', {'name': 'gpt2'}, r'dataset\.name: expected one of text \(.*\) for gpt2, got python_packages'),
    ):
        with pytest.raises(InputError, match=message):
            build_trainer(parse_recipe(settings | {'dataset': {'name': data, 'batch_size': 16, 'limit': 32}, 'model': model}))
