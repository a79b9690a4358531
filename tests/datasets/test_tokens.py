"""Sequences of tokens: flat files, MDS shards, text files, an encoding trained on text, and conversion between them."""

import ast
import heapq
import inspect
import json
import os
import subprocess
import sys
import tokenize

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from composer_effalgos.datasets import build_dataset
from composer_effalgos.datasets.convert import convert
from composer_effalgos.datasets.sequences import cut
from composer_effalgos.datasets.text import END, bpe_tokens, encode, train_tokenizer
from composer_effalgos.datasets.tokens import token_type, write_tokens
from composer_effalgos.utils.errors import InputError

TEXT = b'the cat sat on the mat; the dog sat on the log. ' * 40
WORDS = 50257


@pytest.fixture
def nanogpt(tmp_path):
    """What nanoGPT's prepare.py leaves: ``np.array(ids, dtype=np.uint16).tofile``."""
    ids = {'train': np.random.default_rng(0).integers(WORDS, size=1003), 'val': np.arange(100)}
    for name, content in ids.items():
        np.array(content, dtype=np.uint16).tofile(tmp_path / f'{name}.bin')
    return tmp_path, ids


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    for name, content in {'train/a/1.txt': TEXT, 'train/2.md': 'naïve café 猫\n'.encode() * 20, 'val/3.txt': TEXT[:500]}.items():
        (tmp_path / 'texts' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'texts' / name).write_bytes(content)
    return tmp_path / 'texts'


def test_nanogpts_files_are_cut_into_sequences(nanogpt):
    folder, ids = nanogpt
    train, held_out = (build_dataset('tokens', split, path=str(folder), seq_len=16, vocab_size=WORDS) for split in ('train', 'eval'))
    assert (len(train), len(held_out), train.num_classes, train.seq_len) == (62, 6, WORDS, 16)
    assert isinstance(train.sequences, np.memmap)
    batches = list(DataLoader(train, batch_size=31, num_workers=1))
    assert torch.equal(torch.cat([batch['input_ids'] for batch in batches]).flatten(), torch.from_numpy(ids['train'][: 62 * 16]))
    assert all(torch.equal(batch['labels'], batch['input_ids']) and batch['labels'].dtype == torch.int64 for batch in batches)
    some = build_dataset('tokens', 'train', path=str(folder), seq_len=16, vocab_size=WORDS, limit=7)
    assert {row.tobytes() for row in some.sequences} < {row.tobytes() for row in train.sequences}
    assert len(build_dataset('tokens', 'eval', path=str(folder), seq_len=16, vocab_size=WORDS, eval_samples=2)) == 2


@given(st.integers(2, 40), st.integers(2, 400), st.integers(2, 2**32))
def test_what_is_written_is_what_is_read(tmp_path_factory, seq_len, count, vocab_size):
    folder = tmp_path_factory.mktemp('tokens')
    written = np.random.default_rng(count).integers(vocab_size, size=count)
    for name in ('train', 'val'):
        assert write_tokens(folder / f'{name}.bin', np.array_split(written, 3), vocab_size) == count
    options = {'path': str(folder), 'seq_len': seq_len, 'vocab_size': vocab_size, 'dtype': token_type(vocab_size)}
    if count < seq_len:
        with pytest.raises(InputError, match=f'seq_len: expected at most {count}'):
            build_dataset('tokens', 'train', **options)
    else:
        found = build_dataset('tokens', 'train', **options)
        read = np.concatenate([found[index]['input_ids'].numpy() for index in range(len(found))])
        assert np.array_equal(read, written[: len(read)])
        assert count - len(read) < seq_len


@pytest.mark.parametrize(
    ('change', 'options', 'message'),
    [
        (None, {}, r'dataset\.vocab_size: missing, .* 50257 for GPT-2'),
        (None, {'vocab_size': 1}, r'dataset\.vocab_size: expected a number at least 2, got 1'),
        (None, {'vocab_size': WORDS, 'seq_len': 1}, r'dataset\.seq_len: expected a number at least 2'),
        (None, {'vocab_size': WORDS, 'seq_len': 2000}, r'seq_len: expected at most 1003, the tokens of the train split, got 2000'),
        (None, {'vocab_size': WORDS, 'dtype': 'int8'}, r'dataset\.dtype'),
        (
            None,
            {'vocab_size': WORDS, 'dtype': 'uint32'},
            r'2006 bytes, expected a multiple of 4 \(uint32\): cut off, or of',
        ),
        (None, {'vocab_size': WORDS, 'limit': 10**6}, r'dataset\.limit'),
        (
            lambda folder: (folder / 'train.bin').write_bytes(b'123'),
            {'vocab_size': WORDS},
            r'3 bytes, expected a multiple of 2',
        ),
        (lambda folder: (folder / 'train.bin').write_bytes(b''), {'vocab_size': WORDS}, r'train\.bin: 0 bytes'),
        (lambda folder: (folder / 'train.bin').unlink(), {'vocab_size': WORDS}, r'train\.bin: no such file; expected tokens as nanoGPT'),
        (lambda folder: [(folder / 'train.bin').unlink(), os.mkfifo(folder / 'train.bin')], {'vocab_size': WORDS}, r'no such file'),
        (lambda folder: (folder / 'meta.json').write_text('[]'), {}, r'meta\.json: not a description of tokens'),
        (lambda folder: (folder / 'meta.json').write_text('{"vocab_size": true, "tokens": {}, "source": ""}'), {}, r'meta\.json: not a'),
        (
            lambda folder: (folder / 'meta.json').write_text('{"vocab_size": 99, "tokens": {"train": 7}, "source": ""}'),
            {},
            r'says 7: cut off',
        ),
    ],
)
def test_bad_files_and_options_are_one_line(nanogpt, change, options, message):
    folder, _ = nanogpt
    if change is not None:
        change(folder)
    with pytest.raises(InputError, match=message) as caught:
        build_dataset('tokens', 'train', path=str(folder), **{'seq_len': 16, **options})
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(('written', 'options'), [('<u4', {'dtype': 'uint16'}), ('<i8', {}), ('<i8', {'dtype': 'uint32'})])
def test_wider_integers_are_not_read_as_twice_as_many_tokens(nanogpt, written, options):
    folder, ids = nanogpt
    ids['train'].astype(written).tofile(folder / 'train.bin')
    with pytest.raises(InputError, match=r'train\.bin: every second token read as uint\d\d is 0, so they are wider integers'):
        build_dataset('tokens', 'train', path=str(folder), seq_len=16, vocab_size=WORDS, **options)


def test_the_vocabulary_decides_the_width(tmp_path):
    ids = np.arange(70000, 71000)
    ids.astype('<u4').tofile(tmp_path / 'train.bin')
    found = build_dataset('tokens', 'train', path=str(tmp_path), seq_len=16, vocab_size=128256)
    assert (len(found), found[0]['input_ids'].tolist()) == (62, ids[:16].tolist())


def test_a_token_beyond_the_vocabulary_is_refused_where_it_is_read(nanogpt):
    folder, ids = nanogpt
    found = build_dataset('tokens', 'train', path=str(folder), seq_len=16, vocab_size=int(ids['train'].max()))
    row = int(ids['train'].argmax()) // 16
    with pytest.raises(InputError, match=rf'train\.bin: sequence {row}: expected tokens from 0 to .*; set dataset\.vocab_size'):
        found[row]


def test_text_files_are_read_in_the_order_of_their_paths(texts):
    found = build_dataset('text_files', 'train', path=str(texts), seq_len=32)
    whole = (texts / 'train/2.md').read_bytes() + TEXT
    assert found.sequences.tobytes() == whole[: len(whole) // 32 * 32]
    assert found.num_classes == 256
    assert build_dataset('text_files', 'eval', path=str(texts), seq_len=32).sequences.tobytes() == TEXT[: 500 // 32 * 32]


def test_a_trained_encoding_gives_the_text_back_and_is_kept(texts, tmp_path, monkeypatch):
    options = {'path': str(texts), 'tokenizer': 'bpe', 'vocab_size': 300, 'seq_len': 8}
    found = build_dataset('text_files', 'train', **options)
    (folder,) = (path for path in (tmp_path / 'cache' / 'composer_effalgos').iterdir() if path.is_dir())
    meta = json.loads((folder / 'meta.json').read_text())
    assert found.num_classes == meta['vocab_size'] <= 300
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    ids = np.fromfile(folder / 'train.bin', np.uint16)
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == (texts / 'train/2.md').read_text() + END + TEXT.decode() + END
    assert (ids == 0).sum() == 2
    monkeypatch.setattr('composer_effalgos.datasets.text.train_tokenizer', None)  # not called again
    assert np.array_equal(build_dataset('text_files', 'train', **options).sequences, found.sequences)


def test_training_an_encoding_gives_the_same_one_every_time():
    """In another process, where hashes are seeded otherwise, and on several threads."""
    code = inspect.getsource(train_tokenizer).replace('-> Any', '').replace('documents: Sequence[bytes]', 'documents')
    code = f'END = {END!r}\ncharacters = bytes.decode\n{code}\nimport ast, heapq, inspect, tokenize\n'
    code += 'print(train_tokenizer([inspect.getsource(m).encode() for m in (ast, heapq, tokenize)], 700).to_str())'
    environment = os.environ | {'TOKENIZERS_PARALLELISM': 'true', 'RAYON_NUM_THREADS': '4', 'PYTHONHASHSEED': '7'}
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=environment).stdout
    here = train_tokenizer([inspect.getsource(module).encode() for module in (ast, heapq, tokenize)], 700)
    assert here.get_vocab_size() == 700
    assert other.strip() == here.to_str()


def test_a_text_that_spells_the_end_of_a_document_does_not_end_it():
    tokenizer = train_tokenizer([TEXT], 300)
    (ids,) = encode(tokenizer, [f'a {END} b'.encode()])
    assert (ids == 0).sum() == 1
    assert ids[-1] == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'tokenizer': 'bpe', 'vocab_size': 256}, r'dataset\.vocab_size: expected 257 to 65536 with tokenizer bpe, got 256'),
        ({'tokenizer': 'bpe', 'vocab_size': 10**6}, r'dataset\.vocab_size'),
        ({'vocab_size': 300}, r'dataset\.vocab_size: expected null or 256 with tokenizer bytes, got 300; set dataset\.tokenizer=bpe'),
        ({'tokenizer': 'words'}, r'dataset\.tokenizer'),
        ({'seq_len': 10**6}, r'dataset\.seq_len'),
    ],
)
def test_bad_options_of_text_are_one_line(texts, options, message):
    with pytest.raises(InputError, match=message):
        build_dataset('text_files', 'train', path=str(texts), **options)


def test_a_cache_that_cannot_be_written_is_one_line(texts, tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    with pytest.raises(InputError, match='XDG_CACHE_HOME'):
        bpe_tokens({'train': [TEXT], 'val': [TEXT]}, 300, 'x')


def rows(dataset) -> list[bytes]:
    return [dataset[index]['input_ids'].numpy().tobytes() for index in range(len(dataset))]


@pytest.mark.parametrize('tokenizer', ['bytes', 'bpe'])
def test_text_to_tokens_to_shards_and_back_is_the_same(texts, tmp_path, tokenizer):
    pytest.importorskip('streaming')
    first = [f'path={texts}', f'tokenizer={tokenizer}', 'seq_len=16', *(['vocab_size=300'] if tokenizer == 'bpe' else [])]
    said = convert('text_files', first, 'tokens', tmp_path / 'flat')
    convert('tokens', [f'path={tmp_path / "flat"}', 'seq_len=16'], 'mds', tmp_path / 'shards', shard_bytes=2000)
    convert('mds_tokens', [f'path={tmp_path / "shards"}'], 'tokens', tmp_path / 'again')
    options = {'path': str(texts), 'tokenizer': tokenizer, 'seq_len': 16} | ({'vocab_size': 300} if tokenizer == 'bpe' else {})
    for split in ('train', 'eval'):
        expected = build_dataset('text_files', split, **options)
        for name, folder, more in (('tokens', 'flat', {'seq_len': 16}), ('mds_tokens', 'shards', {}), ('tokens', 'again', {'seq_len': 16})):
            found = build_dataset(name, split, path=str(tmp_path / folder), **more)
            assert rows(found) == rows(expected)
            assert (found.num_classes, found.seq_len) == (expected.num_classes, 16)
    assert len(list((tmp_path / 'shards' / 'train').glob('*.mds'))) > 1
    assert (tmp_path / 'flat' / 'tokenizer.json').exists() == (tokenizer == 'bpe')
    assert f'{len(build_dataset("text_files", "train", **options))} training and' in said
    by_shard = build_dataset('mds_tokens', 'train', path=str(tmp_path / 'shards'), shuffle='shards')
    assert by_shard.shard_starts[0] == 0
    assert len(by_shard.shard_starts) > 1
    with pytest.raises(InputError, match='expected none of its files to exist'):
        convert('tokens', [f'path={tmp_path / "flat"}', 'seq_len=16'], 'mds', tmp_path / 'shards')


def test_conversion_may_shuffle_and_refuses_what_does_not_fit(nanogpt, tmp_path):
    folder, ids = nanogpt
    options = [f'path={folder}', 'seq_len=16', f'vocab_size={WORDS}']
    convert('tokens', options, 'tokens', tmp_path / 'shuffled', shuffle=3)
    found = np.fromfile(tmp_path / 'shuffled' / 'train.bin', np.uint16).reshape(-1, 16)
    kept = ids['train'][: 62 * 16].reshape(-1, 16)
    assert not np.array_equal(found, kept)
    assert sorted(map(bytes, found.astype(np.int64))) == sorted(map(bytes, kept))
    for source, to, message in (
        ('tokens', 'ffcv', 'expected mds or tokens for tokens, got ffcv'),
        ('digits', 'tokens', 'expected ffcv or mds for digits, got tokens'),
        ('python_packages', 'mds', 'holds no images'),
        ('tokens', 'tokenz', "did you mean 'tokens'"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source, options if source == 'tokens' else [], to, tmp_path / 'none')


def write_shards(folder, columns: dict, samples: list[dict]) -> None:
    from streaming import MDSWriter

    for name in ('train', 'val'):
        with MDSWriter(out=str(folder / name), columns=columns) as out:
            for sample in samples:
                out.write(sample)


def test_llm_foundrys_bytes_are_read_with_the_type_that_is_said(tmp_path):
    pytest.importorskip('streaming')
    ids = np.random.default_rng(0).integers(WORDS, size=(9, 20))
    write_shards(tmp_path, {'tokens': 'bytes'}, [{'tokens': row.astype(np.int64).tobytes()} for row in ids])
    found = build_dataset('mds_tokens', 'train', path=str(tmp_path), vocab_size=WORDS)
    assert rows(found) == [row.tobytes() for row in ids]
    shorter = build_dataset('mds_tokens', 'eval', path=str(tmp_path), vocab_size=WORDS, seq_len=8, eval_samples=3)
    assert (len(shorter), shorter.seq_len) == (3, 8)
    for options, message in (
        ({}, r'dataset\.vocab_size: missing'),
        ({'vocab_size': WORDS, 'seq_len': 21}, r'sample 0: expected 21 tokens, got 20'),
        ({'vocab_size': WORDS, 'column': 'token'}, r"dataset\.column: expected a column of .*, got 'token'; it has tokens"),
        ({'vocab_size': 10}, r'sample 0: expected tokens from 0 to 9'),
    ):
        with pytest.raises(InputError, match=message):
            build_dataset('mds_tokens', 'train', path=str(tmp_path), **options)


def test_samples_that_are_no_tokens_are_refused(tmp_path):
    pytest.importorskip('streaming')
    for name, columns, sample, message in (
        ('text', {'tokens': 'str'}, {'tokens': 'a'}, r'dataset\.column: expected a column of type bytes, ndarray'),
        ('odd', {'tokens': 'bytes'}, {'tokens': b'123'}, r'3 bytes do not fit int64; set dataset\.dtype'),
        ('floats', {'tokens': 'ndarray:float32:4'}, {'tokens': np.ones(4, np.float32)}, 'expected whole numbers in one dimension'),
    ):
        write_shards(tmp_path / name, columns, [sample])
        with pytest.raises(InputError, match=message):
            build_dataset('mds_tokens', 'train', path=str(tmp_path / name), vocab_size=9)


def test_sequences_do_not_overlap_and_none_is_lost():
    found = cut(np.arange(103), 200, 'train', seq_len=10, limit=None, eval_samples=None)
    assert found.sequences.tolist() == np.arange(100).reshape(10, 10).tolist()
