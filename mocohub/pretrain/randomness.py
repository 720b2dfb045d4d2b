"""Randomness as a pure function of its purpose: no state to save, no dependence on ranks or workers."""

import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mocohub.pretrain.recipe import Recipe


class Draws(NamedTuple):
    """What is drawn for one step, on the CPU, the same on every rank."""

    shuffle: Tensor  # (B,) order in which keys are encoded, int64
    second_shuffle: Tensor | None = None  # likewise for the other direction of a symmetric loss
    negatives: Tensor | None = None  # (K,) images whose entries of the memory bank are negatives, int64


def draws(recipe: Recipe, step: int, num_images: int | None = None) -> Draws:
    """Return what `recipe` draws in one step of training on `num_images` images."""
    size = recipe.global_batch_size
    if recipe.mechanism == "memory_bank":
        negatives = stream(recipe.seed, "negatives", step).integers(num_images, size=recipe.queue_size)
        return Draws(torch.arange(size), negatives=torch.from_numpy(negatives))
    if not recipe.shuffle_bn:
        return Draws(torch.arange(size), torch.arange(size))
    first = permutation(recipe.seed, "shuffle", step, size)
    return Draws(first, permutation(recipe.seed, "second shuffle", step, size) if recipe.symmetric else None)


def stream(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the random stream of one decision, for instance `stream(seed, "view", epoch, image_id, view)`.

    Streams of different purposes or keys are independent (numpy's SeedSequence, Philox).
    """
    sequence = np.random.SeedSequence(seed, spawn_key=(zlib.crc32(purpose.encode()), *key))
    return np.random.Generator(np.random.Philox(sequence))


def permutation(seed: int, purpose: str, key: int, n: int) -> Tensor:
    """Return a permutation of n items, int64 on the CPU."""
    return torch.from_numpy(stream(seed, purpose, key).permutation(n))
