"""A small GPT-2 on a StreamingDataset of tokens, on two ranks: pruned, grown, killed, resumed, from a folder and from S3."""

import http.server
import importlib.util
import re
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip('streaming', reason='needs mosaicml-streaming; make setup installs it')

SCRIPT = Path(__file__).parent / 'scripts' / 'train_tokens.py'
ALL = ['infobatch', 'adabatch']


@pytest.fixture(scope='module')
def write_tokens():
    spec = importlib.util.spec_from_file_location('train_tokens', SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.write_tokens


class S3(http.server.BaseHTTPRequestHandler):
    """As much of S3 as reading objects takes; the server's ``root`` holds buckets, its ``read`` notes objects and readers."""

    def answer(self, body: bool) -> None:
        file = self.server.root / self.path.lstrip('/')
        reader = re.search(r'Credential=(\w+)/', self.headers.get('Authorization', ''))
        if reader is None or not file.is_file():
            self.send_error(403 if reader is None else 404)
            return
        content = file.read_bytes()
        self.send_response(200)
        for name, value in {'Content-Length': len(content), 'ETag': '"0"', 'Last-Modified': 'Tue, 24 Nov 2026 00:00:00 GMT'}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.server.read.append((file.name, reader[1]))
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def s3(tmp_path):
    """A server of S3 objects, the files in ``tmp_path``; the first folder of a path is the bucket."""
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), S3)
    server.root, server.read = tmp_path, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def train(forked, *runs: list[str], **environment: str) -> None:
    """Runs the script on two ranks for each of the runs, one after the other."""
    for run in runs:
        status, said = forked(str(SCRIPT), *run, ranks=2, **environment)
        assert (status != 0) == ('--kill-at' in run), said[-6000:]


def result(folder: Path) -> dict:
    return torch.load(folder / 'final.pt', weights_only=False)


def fetched(folder: Path) -> Counter:
    """How often each shard was fetched, by whichever rank."""
    return Counter(line.split()[0] for line in (folder / 'local' / 'fetched.txt').read_text().splitlines())


@pytest.fixture(scope='module')
def runs(write_tokens, forked, tmp_path_factory) -> Path:
    """A folder of finished runs, and of one of each kind that was killed and not resumed yet."""
    place = tmp_path_factory.mktemp('tokens')
    write_tokens(place / 'remote')

    def options(folder: str, *arguments: str, workers: int = 1) -> list[str]:
        (place / folder).mkdir(exist_ok=True)
        return ['--folder', str(place / folder), '--remote', str(place / 'remote'), '--workers', str(workers), *arguments]

    train(
        forked,
        options('all', '--algorithms', *ALL),
        options('all_killed', '--algorithms', *ALL, '--kill-at', '11'),
        options('adabatch', '--algorithms', 'adabatch'),
        options('adabatch_killed', '--algorithms', 'adabatch', '--kill-at', '11'),
        options('adabatch_killed', '--algorithms', 'adabatch'),
        options('plain', '--duration', '2ep'),
        options('short', '--algorithms', 'adabatch', '--duration', '8ba'),
    )
    return place


def assert_resumed(whole: dict, resumed: dict, batches: int) -> None:
    for all_of_it, rest in zip(whole['batches'], resumed['batches'], strict=True):
        assert rest == all_of_it[batches:]
    for name, value in whole['model'].items():
        assert torch.equal(value, resumed['model'][name]), name


@pytest.mark.distributed
@pytest.mark.parametrize('name', ['all', 'adabatch'])
def test_killed_and_resumed(runs, forked, name):
    whole = result(runs / name)
    sizes = [len(batch) for batch in whole['batches'][0]]
    assert {6, 12} <= set(sizes)
    first = [sequence for rank in whole['batches'] for batch in rank[:8] for sequence in batch]
    assert len(set(first)) == len(first) == 96  # an epoch over both ranks, none twice
    assert whole['saved'] == [] or whole['saved'][0] > 0
    killed = runs / f'{name}_killed'
    if name == 'all':
        train(forked, ['--folder', str(killed), '--remote', str(runs / 'remote'), '--workers', '1', '--algorithms', *ALL])
    assert_resumed(whole, result(killed), 10)
    assert set(fetched(runs / name).values()) == {1}  # by the one or the other rank


@pytest.mark.distributed
def test_without_growth_it_is_plain_composer_on_two_ranks(runs):
    plain, ours = result(runs / 'plain'), result(runs / 'short')
    assert [rank[:8] for rank in plain['batches']] == [rank[:8] for rank in ours['batches']]


@pytest.mark.distributed
def test_no_shard_of_an_s3_remote_is_read_twice(s3, forked, write_tokens, tmp_path, runs):
    pytest.importorskip('boto3', reason='an s3:// remote needs boto3')
    write_tokens(tmp_path / 'bucket' / 'tokens')
    shards = {path.name for path in (tmp_path / 'bucket' / 'tokens').glob('*.mds')}
    options = ['--folder', str(tmp_path), '--remote', 's3://bucket/tokens', '--workers', '1', '--algorithms', *ALL]
    environment = {'S3_ENDPOINT_URL': f'http://127.0.0.1:{s3.server_port}', 'AWS_SECRET_ACCESS_KEY': 'x', 'AWS_DEFAULT_REGION': 'us-east-1'}
    train(forked, [*options, '--kill-at', '6'], options, **environment)
    assert_resumed(result(runs / 'all'), result(tmp_path), 5)  # on the same data in a folder
    read = Counter(s3.read)
    assert {name for name, _ in read} == {'index.json', *shards}
    assert {reader for name, reader in read if name in shards} == {'rank0', 'rank1'}
    times = Counter(name for name, _ in s3.read if name in shards)
    assert sum(times.values()) <= len(shards) + 2  # a download that each rank was killed in
    assert max(times.values()) <= 2
