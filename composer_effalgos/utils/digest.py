"""Fingerprints of data."""

import hashlib

import torch
from torch import Tensor


def labels_digest(labels: Tensor) -> str:
    """SHA-256, in hexadecimal, of labels ``[N]`` on the CPU in order, as little-endian 64-bit integers."""
    return hashlib.sha256(labels.to(torch.int64).numpy().astype('<i8').tobytes()).hexdigest()
