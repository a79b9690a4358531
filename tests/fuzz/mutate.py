"""Seeded damage to files and to plain data, and a limit on the time that reading them takes."""

import copy
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def deep(depth: int = 3000) -> list[Any]:
    """A list in a list in a list, more often than a recursive reader can follow."""
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def odd_value(draw: random.Random) -> Any:
    """Plain data that seldom fits."""
    numbers = [None, True, -1, 0, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float('nan'), float('inf')]
    texts = ['', ' ', '.', '..', '../../beside', '/dev/zero', 'a\0b', 'a\nb', '\x1b[31m', '\udc00', 'x' * 5000, 'pkl', '1' * 5000]
    texts += ['${dataset}', '${']
    return draw.choice([*numbers, *texts, [], {}, [[]], {'': None}, deep(40)])


def damage_bytes(draw: random.Random, data: bytes) -> bytes:
    """Changes, cuts or doubles some of a file's bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        place = draw.randrange(len(changed) + 1)
        if draw.random() < 0.4:  # headers are at the ends
            place = draw.choice([min(place, 64), max(len(changed) - 1 - draw.randrange(200), 0)])
        kind = draw.randrange(6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            size = draw.choice([1, 2, 4, 8])
            changed[place : place + size] = (draw.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, 'little')
        elif kind == 2:
            del changed[place : place + draw.choice([1, 7, 200])]
        elif kind == 3:
            changed[place:place] = draw.randbytes(draw.choice([1, 8, 300]))
        elif kind == 4:
            changed[place : place + 100] = bytes(min(100, len(changed) - place))
        elif draw.random() < 0.3:
            del changed[place:]
    return bytes(changed)


def damage_tree(draw: random.Random, tree: Any) -> Any:
    """Replaces, removes or adds a few of the values in lists and mappings."""
    changed = copy.deepcopy(tree)
    for _ in range(draw.choice([1, 1, 2, 3])):
        nodes = [node for node in _containers(changed) if node]
        if not nodes or draw.random() < 0.05:
            return odd_value(draw)
        node = draw.choice(nodes)
        key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        kind = draw.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[draw.choice(['', 'a', 'name', 'path'])] = odd_value(draw)
        else:
            node[key] = odd_value(draw)
    return changed


def _containers(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _containers(value)


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Ends what takes longer with a ``TimeoutError``: a hang fails."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f'took more than {seconds} s')

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
