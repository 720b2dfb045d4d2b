"""Randomness as a pure function of its purpose: no state to save, no dependence on ranks or workers."""

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the random stream of one decision, for instance `stream(seed, "view", epoch, image_id, view)`.

    Streams of different purposes or keys are independent (numpy's SeedSequence, Philox).
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *key))
    return np.random.Generator(np.random.Philox(sequence))


def permutation(seed: int, purpose: str, key: int, n: int) -> torch.Tensor:
    """Return a permutation of n items, int64 on the CPU."""
    return torch.from_numpy(stream(seed, purpose, key).permutation(n))
