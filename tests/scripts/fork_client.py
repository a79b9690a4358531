"""Runs a script through the fork server, as ``python SCRIPT ...`` would: fork_client.py SOCKET RANKS SCRIPT ..."""

import json
import os
import socket
import sys
from pathlib import Path

path, ranks, *argv = sys.argv[1:]
output = f'/proc/{os.getpid()}/fd/1'
request = {'argv': argv, 'ranks': int(ranks), 'environment': dict(os.environ), 'folder': str(Path.cwd()), 'outputs': [output] * int(ranks)}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(path)
    with connection.makefile('rw') as stream:
        stream.write(json.dumps(request) + '\n')
        stream.flush()
        sys.exit(max(map(abs, json.loads(stream.readline()))))
