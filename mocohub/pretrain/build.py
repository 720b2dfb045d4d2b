"""From a recipe and a machine to the objects a training needs."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from mocohub import distributed
from mocohub.backbones import create_backbone, pretrained_cfg
from mocohub.features.precision import fast_bfloat16
from mocohub.pretrain.augment_batch import finish_views
from mocohub.pretrain.baselines import EndToEnd, MemoryBankContrast
from mocohub.pretrain.batchnorm import group_batch_norms
from mocohub.pretrain.dictionary import MemoryBank, Queue
from mocohub.pretrain.encoder import Encoder, projection_head
from mocohub.pretrain.moco import MoCo
from mocohub.pretrain.randomness import stream
from mocohub.pretrain.recipe import Recipe


def build(
    recipe: Recipe,
    device: torch.device,
    *,
    num_images: int | None = None,
    micro_batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    compile: bool = False,
) -> MoCo:
    """Return an untrained MoCo: a function of the recipe and its seed alone.

    Args:
        recipe: What to build.
        device: Where it shall live.
        num_images: Of the training set; the memory bank has an entry for each.
        micro_batch_size: See `MoCo`.
        autocast_dtype: See `MoCo`.
        compile: Whether to compile the encoders with torch.compile.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(recipe.seed, "initial weights").integers(2**63)))
        net = create_backbone(recipe.backbone, **recipe.model_args)
        net.pretrained_cfg |= pretrained_cfg(
            recipe.backbone,
            crop_px=recipe.crop_px,
            crop_pct=recipe.eval_crop_pct,
            mean=recipe.mean,
            std=recipe.std,
        )
        head = projection_head(recipe.head, net.num_features, recipe.embed_dim)
        if recipe.mechanism == "memory_bank":
            bank = MemoryBank.random(
                num_images, recipe.embed_dim, recipe.bank_momentum, torch.default_generator
            )
            bank.entries = bank.entries.to(device)
        elif recipe.mechanism == "queue":
            queue = Queue.random(recipe.queue_size, recipe.embed_dim, torch.default_generator)
            queue.embeddings = queue.embeddings.to(device)
    query = group_batch_norms(Encoder(net, head), recipe.bn_group_size)
    query = query.to(device, memory_format=torch.channels_last)
    key = copy.deepcopy(query)
    if compile:
        query.compile()
        key.compile()
    finish = partial(finish_views, augmentation=recipe.augmentation, mean=recipe.mean, std=recipe.std)
    settings = {
        "temperature": recipe.temperature,
        "finish": finish,
        "micro_batch_size": micro_batch_size,
        "autocast_dtype": autocast_dtype,
    }
    if recipe.mechanism == "memory_bank":
        return MemoryBankContrast(query, bank, _sgd(recipe, query), loss=recipe.loss, **settings)
    settings["symmetric"] = recipe.symmetric
    if recipe.mechanism == "end_to_end":
        return EndToEnd(query, key, _sgd(recipe, query, key), **settings)
    return MoCo(query, key, queue, _sgd(recipe, query), key_momentum=recipe.key_momentum, **settings)


def _sgd(recipe: Recipe, *encoders: Encoder) -> torch.optim.SGD:
    parameters = [parameter for encoder in encoders for parameter in encoder.parameters()]
    # fused: one pass over weights, gradients and momentum, where the default takes several.
    return torch.optim.SGD(
        parameters,
        lr=recipe.base_lr,
        momentum=recipe.sgd_momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return what encoders shall compute in, None for float32.

    Raises:
        ValueError: If `precision` is not auto, float32 or bfloat16.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"precision '{precision}' is not known. Choose auto, float32 or bfloat16.")
    if precision == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else None
    return torch.bfloat16 if precision == "bfloat16" else None


@contextmanager
def shared_cores(device: torch.device, num_workers: int | None) -> Iterator[int]:
    """Give the number of decoding processes; on the CPU, keep torch to its share of the cores meanwhile.

    There decoding and step share the cores: as many threads as cores, and as many workers, which take what
    the threads leave over (`signals.shield_worker`). So neither waits while there is work for the other.
    """
    cores = max(1, distributed.num_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if num_workers is None:
        num_workers = min(8, cores)
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(min(threads, cores))
    try:
        yield num_workers
    finally:
        torch.set_num_threads(threads)
