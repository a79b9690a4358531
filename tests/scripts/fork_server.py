"""Runs scripts on ranks that are forked from this process, because importing Composer takes longer than most trainings of the tests.

Listens on the Unix socket named by the only argument until standard input ends. A connection sends one line of JSON with

    argv         ['script.py', ...] or ['-m', 'module', ...]
    ranks        number of processes
    environment  all environment variables of the processes
    folder       working directory
    outputs      one file per rank, for its standard output and error

and receives one line, the list of the ranks' exit statuses. As with a launcher, the others are stopped as soon as one rank fails;
theirs is then 0.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import composer.algorithms  # noqa: F401
import torch
from composer.utils import collect_env

import composer_effalgos.train  # noqa: F401

torch.set_num_threads(1)
# every Trainer and every checkpoint asks for these; the ranks inherit the answers
collect_env.get_composer_commit_hash = functools.cache(collect_env.get_composer_commit_hash)
collect_env.get_composer_env_dict()
gc.freeze()  # a collection in a rank would otherwise copy every page of what was imported
GRACE = 30  # seconds that the others have to stop by themselves


def fork(request: dict[str, Any]) -> list[int] | None:
    """Start the ranks and wait for them.

    Returns:
        The exit statuses; in a forked process ``None``.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    running: dict[int, int] = {}
    for rank in range(request['ranks']):
        child = os.fork()
        if not child:
            become(rank, request, port)
            return None
        running[child] = rank
    statuses = [0] * request['ranks']
    deadline = None
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            if deadline is not None and time.monotonic() > deadline:
                for other in running:
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.02)
            continue
        rank = running.pop(child)
        if deadline is not None:
            continue  # stopped because another failed, whose status counts
        statuses[rank] = os.waitstatus_to_exitcode(status)
        if status:
            deadline = time.monotonic() + GRACE
            for other in running:
                os.kill(other, signal.SIGTERM)
    return statuses


def become(rank: int, request: dict[str, Any], port: str) -> None:
    """Turn a forked process into what a launcher would have started."""
    output = os.open(request['outputs'][rank], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(request['folder'])
    os.environ.clear()
    os.environ.update(request['environment'])
    if request['ranks'] > 1:
        os.environ |= dict.fromkeys(('RANK', 'LOCAL_RANK'), str(rank))
        os.environ |= dict.fromkeys(('WORLD_SIZE', 'LOCAL_WORLD_SIZE'), str(request['ranks']))
        os.environ |= {'NODE_RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}


def main() -> None:
    """Serve until standard input ends; in a forked process run the script instead."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f'{sys.argv[1]}.new')
    listener.listen()
    Path(f'{sys.argv[1]}.new').rename(sys.argv[1])  # whoever finds the socket can connect to it
    while True:
        if sys.stdin in select.select([sys.stdin, listener], [], [])[0]:
            return
        connection, _ = listener.accept()
        with connection:
            request = json.loads(connection.makefile().readline())
            statuses = fork(request)
            if statuses is not None:
                with contextlib.suppress(ConnectionError):  # to a client that was killed
                    connection.sendall(json.dumps(statuses).encode() + b'\n')
                continue
        break  # out of the loop, so that a forked process ends as any script does
    listener.close()
    script, *arguments = request['argv']
    if script == '-m':
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name='__main__', alter_sys=True)
    else:
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()
