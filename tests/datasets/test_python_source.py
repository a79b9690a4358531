import ast
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.python_source import _files, python_source
from composer_effalgos.utils.errors import InputError


def test_sequences_are_the_librarys_own_text_and_the_splits_share_no_file():
    train, held_out = python_source('train', seq_len=64), python_source('eval', seq_len=64, eval_samples=None)
    texts = {split: data.sequences.tobytes() for split, data in (('train', train), ('eval', held_out))}
    for name in ('ast.py', 'json/decoder.py', 'heapq.py', 'tokenize.py', 'logging/__init__.py', 'argparse.py'):
        content = Path(sysconfig.get_path('stdlib'), name).read_bytes()
        assert [content in text for text in texts.values()].count(True) == 1, name
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.2
    assert sum(map(len, _files())) - sum(map(len, texts.values())) < 2 * 64, 'at most the end of each split is left out'


def test_only_modules_of_the_standard_library_are_read():
    contents = _files()
    assert Path(ast.__file__).read_bytes() in contents
    for outside in (np.__file__, torch.__file__, pytest.__file__, sysconfig.__file__):
        assert Path(outside).read_bytes() not in contents
    assert len(contents) > 300
    assert not any(b'unittest.main()' in content and b'test_support' in content for content in contents)


def test_the_same_options_give_the_same_sequences_and_others_do_not():
    def first(**options):
        return python_source('train', seq_len=32, limit=50, **options).sequences

    assert np.array_equal(first(), first())
    assert not np.array_equal(first(), first(seed=1))
    large, small = (python_source('train', limit=limit).sequences for limit in (200, 50))
    assert {row.tobytes() for row in small} < {row.tobytes() for row in large}
    assert python_source('eval', limit=5).sequences.shape == (1024, 128), 'limit is of the training split'
    assert len(python_source('eval', eval_samples=10**9)) == len(python_source('eval', eval_samples=None))


def test_batches_are_what_language_models_take():
    dataset = build_dataset('python_source', 'train', seq_len=16, limit=5)
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    assert set(batch) == {'input_ids', 'labels'}
    for tokens in batch.values():
        assert tokens.dtype == torch.int64
        assert tokens.shape == (4, 16)
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < dataset.num_classes
    assert bytes(batch['input_ids'][2].tolist()) == dataset.sequences[2].tobytes()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'seq_len': 1}, r'dataset\.seq_len: expected a number at least 2'),
        ({'seq_len': 10**9}, r'dataset\.seq_len: expected at most \d+, .* got 1000000000'),
        ({'limit': 0}, r'dataset\.limit'),
        ({'limit': 10**7}, r'dataset\.limit'),
        ({'eval_samples': 0}, r'dataset\.eval_samples: expected a number at least 1'),
        ({'seed': -1}, r'dataset\.seed: expected a number at least 0'),
        ({'seq_length': 5}, r"dataset\.seq_length: .*'seq_len'"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        build_dataset('python_source', 'train', **options)
    assert '\n' not in str(caught.value)


def test_a_python_without_source_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    _files.cache_clear()
    (tmp_path / 'ast.py').write_text('')
    (tmp_path / 'loop').symlink_to(tmp_path)
    with pytest.raises(InputError, match=f'no source code in {tmp_path}'):
        python_source('train')
    _files.cache_clear()
    assert 'heapq' in sys.stdlib_module_names
