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
    assert sum(map(len, _files().values())) - sum(map(len, texts.values())) < 2 * 64, 'at most the end of each split is left out'


def test_only_modules_of_the_standard_library_are_read():
    contents = list(_files().values())
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


def test_an_encoding_is_trained_on_the_training_split(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    files = {
        f'{name}.py': Path(sysconfig.get_path('stdlib'), f'{name}.py').read_bytes() for name in ('ast', 'heapq', 'abc', 'bisect', 'cmd')
    }
    monkeypatch.setattr('composer_effalgos.datasets.python_source._files', lambda: files)
    monkeypatch.setattr('composer_effalgos.datasets.python_source.HELD_OUT', 5)
    train, held_out = (build_dataset('python_source', split, tokenizer='bpe', vocab_size=400, seq_len=16) for split in ('train', 'eval'))
    assert train.num_classes == held_out.num_classes == 400
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(train.source.with_name('tokenizer.json')))
    texts = [tokenizer.decode(data.sequences.flatten().tolist(), skip_special_tokens=False) for data in (train, held_out)]
    firsts = [text.partition('<|endoftext|>')[0] for text in texts]
    assert all(any(content.decode().startswith(first) for content in files.values()) for first in firsts)
    assert texts[0].count('<|endoftext|>') in (3, 4)  # the last one may be past the last whole sequence
    assert len(train) * 16 < sum(map(len, files.values())) / 2, 'an encoding is shorter than the bytes'


def test_packages_are_even_and_no_piece_is_in_both_splits():
    train, held_out = (build_dataset('python_packages', split, seq_len=64, num_packages=4) for split in ('train', 'eval'))
    for data in (train, held_out):
        assert data.targets.bincount().unique().numel() == 1
        assert data.num_classes == len(data.classes) == 4
    pieces = [{row.tobytes() for row in data.sequences if len(set(row)) > 12} for data in (train, held_out)]  # not of blanks alone
    assert len(pieces[0] & pieces[1]) < 0.06 * len(pieces[1]), 'no more than the tables that files of encodings have in common'
    sample = train[0]
    name = train.classes[int(sample['labels'])]
    content = b''.join(text for path, text in _files().items() if path.startswith(f'{name}/'))
    assert bytes(sample['input_ids'].tolist()) in content
    with pytest.raises(InputError, match=r'dataset\.num_packages: expected at most \d+'):
        build_dataset('python_packages', 'train', num_packages=99)
    with pytest.raises(InputError, match=r'dataset\.seq_len: expected less'):
        build_dataset('python_packages', 'train', seq_len=10**6)


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
