"""A small GPT-2 on a StreamingDataset of tokens, by the composer launcher: pruned, grown, killed, resumed."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip('streaming', reason='needs mosaicml-streaming; make setup installs it')

SCRIPT = Path(__file__).parent / 'scripts' / 'train_tokens.py'


@pytest.fixture
def train_tokens(tmp_path, launch):
    """Runs the script on two ranks; gives what it saved, or ``None`` where it was killed."""
    spec = importlib.util.spec_from_file_location('train_tokens', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_tokens(tmp_path / 'remote')

    def run(folder: str, *arguments: str, ranks: int = 2):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        status, said = launch(str(SCRIPT), '--folder', str(place), '--remote', str(tmp_path / 'remote'), *arguments, ranks=ranks)
        killed = '--kill-at' in arguments
        assert (status != 0) == killed, said[-6000:]
        return None if killed else torch.load(place / 'final.pt', weights_only=False)

    return run


def assert_equal(whole, resumed, batches: int) -> None:
    for all_of_it, rest in zip(whole['batches'], resumed['batches'], strict=True):
        assert rest == all_of_it[batches:]
    for name, value in whole['model'].items():
        assert torch.equal(value, resumed['model'][name]), name


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize('algorithms', [['infobatch', 'adabatch'], ['adabatch']], ids='+'.join)
def test_killed_and_resumed(train_tokens, tmp_path, algorithms):
    arguments = ['--algorithms', *algorithms, '--workers', '1']
    whole = train_tokens('whole', *arguments)
    sizes = [len(batch) for batch in whole['batches'][0]]
    assert {6, 12} <= set(sizes)
    first = [sequence for rank in whole['batches'] for batch in rank[:8] for sequence in batch]
    assert len(set(first)) == len(first) == 96  # an epoch over both ranks, none twice
    assert whole['saved'] == [] or whole['saved'][0] > 0
    train_tokens('killed', *arguments, '--kill-at', '11')
    assert_equal(whole, train_tokens('killed', *arguments), 10)
    fetched = Counter((tmp_path / 'whole' / 'local' / 'fetched.txt').read_text().split())
    assert set(fetched.values()) == {1}  # by the one or the other rank


@pytest.mark.slow
@pytest.mark.distributed
def test_without_growth_it_is_plain_composer_on_two_ranks(train_tokens):
    plain = train_tokens('plain', '--workers', '1', '--duration', '2ep')
    ours = train_tokens('ours', '--workers', '1', '--algorithms', 'adabatch', '--duration', '8ba')
    assert [rank[:8] for rank in plain['batches']] == [rank[:8] for rank in ours['batches']]
