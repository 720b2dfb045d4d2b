"""One extraction from its arguments to its rows: what is computed, by what, and which part of it here."""

import logging
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import PIL
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import mocohub
from mocohub.errors import unknown
from mocohub.features.formats import change_layout
from mocohub.features.identity import contents_sha256
from mocohub.features.inputs import Inputs, StoredImages
from mocohub.features.layers import as_names, needs_head
from mocohub.features.leases import Leases, share_of
from mocohub.features.loading import load_portions
from mocohub.features.manifest import LAYOUTS
from mocohub.features.model import choose_device, data_config, model_facts
from mocohub.features.network import FrozenNetwork
from mocohub.features.plan import Plan, first_errors, refuse_foreign, refuse_to_mix
from mocohub.features.projection import Projection
from mocohub.features.repair import retry_damaged
from mocohub.features.rows import Portion, RowMaker, sample
from mocohub.features.sinks import gather, write_shards
from mocohub.features.store import Features
from mocohub.features.stream import first_items
from mocohub.features.views import CROPS, FiveCrops, code_sha256, own_transform, resized_px, text_of
from mocohub.features.writer import RESERVED, feature_facts
from mocohub.files import writing
from mocohub.hub.load import load
from mocohub.shards import Shards
from mocohub.sources import ImageList

_log = logging.getLogger(__name__)

_DTYPES = ("auto", "float32", "bfloat16")
_OUTPUT_DTYPES = ("float32", "float16")
_POLL_S = 1.0
_IMAGES_PER_TAR = 1000  # at least, to tell a long job: tools that write shards put 1,000 to 10,000 in each


class Job:
    """The arguments of one extraction, checked, and what follows from them."""

    def __init__(
        self,
        model: nn.Module | str | Path,
        images: Any,
        *,
        out: str | Path | None,
        batch_size: int,
        num_workers: int | None,
        device: str | torch.device | None,
        dtype: str,
        output_dtype: str,
        layers: Sequence[str],
        pool: str,
        flip: bool,
        crops: int,
        normalize: bool,
        projection: Projection | str | Path | None,
        transform: Callable[[Image.Image], torch.Tensor] | None,
        rows_per_shard: int,
        shard: str | None,
        content_hash: bool,
        dedup: bool,
        fast_decode: bool,
        format: str | None,
        retry_damaged: bool,
        progress: bool,
    ) -> None:
        """Check the arguments, which are those of `extract`; nothing is computed or written yet."""
        for argument, count, least in (
            ("batch_size", batch_size, 1),
            ("rows_per_shard", rows_per_shard, 1),
            ("num_workers", num_workers, 0),
        ):
            if count is not None and count < least:
                raise ValueError(f"{argument} is {count}, but must be at least {least}.")
        for argument, given, accepted in (
            ("dtype", dtype, _DTYPES),
            ("output_dtype", output_dtype, _OUTPUT_DTYPES),
        ):
            if given not in accepted:
                raise unknown(argument, given, accepted)
        if crops not in CROPS:
            raise ValueError(
                f"crops is {crops}, but must be 1 or 5. The ten crops are crops=5 and flip=True."
            )
        if out is None and shard is not None:
            raise ValueError(f"shard='{shard}' needs out=..., the folder that the processes share.")
        if format is not None and format not in LAYOUTS:
            raise unknown("format", format, LAYOUTS)
        if out is None and format is not None:
            raise ValueError(f"format='{format}' needs out=..., the folder to write.")
        layers = as_names(layers)
        self.format = format
        self.share = share_of(shard) if out is not None else (0, 1)
        if out is not None:
            refuse_foreign(out)
        for layer in layers:
            if layer in RESERVED or not re.fullmatch(r"[\w.:-]+", layer):
                raise ValueError(
                    f"layers names '{layer}', which cannot be the name of a column: letters, digits, _ . : - "
                    f"can, but for {', '.join(sorted(RESERVED))}. Rename the module, or name one around it."
                )
        if projection is not None and len(layers) > 1:
            raise ValueError(f"projection is for one column of features, but layers names {len(layers)}.")
        if isinstance(projection, str | Path):
            projection = Projection.open(projection)

        self.inputs = Inputs(images)
        if dedup and self.inputs.is_stream:
            raise ValueError(
                f"dedup needs images that are listed, but {self.inputs.source} is streamed. Use content_hash "
                "and drop what occurs twice afterwards; or give one local .tar file."
            )
        if (content_hash or dedup) and not (self.inputs.is_stream or hasattr(self.inputs.images, "encoded")):
            raise ValueError(
                f"{'content_hash' if content_hash else 'dedup'} needs the encoded bytes of files or tar "
                f"shards, but images is {self.inputs.source}."
            )
        self.inputs.content_hash = content_hash
        model = _bare(model)
        name = type(model).__name__
        if not isinstance(model, nn.Module | str | Path):
            raise ValueError(f"model is {model!r}, but must be a module, or a name or path to load.")
        if not isinstance(model, nn.Module):
            name, model = str(model), load(model, head=needs_head(layers))
        self.model = model
        self.device = _device(device, model, alone=out is None)
        preprocessed = self.inputs.in_memory and isinstance(self.inputs.images[0], torch.Tensor)
        self.inputs.transform = transform or own_transform(
            model, needed=not preprocessed and not isinstance(self.inputs.images, Dataset)
        )
        self.network_options = {"dtype": dtype, "layers": layers, "pool": pool, "flip": flip}
        # Refuses what is not accepted.
        maps = FrozenNetwork(model, device=self.device, **self.network_options).maps
        for argument, asked in (
            ("normalize", normalize),
            ("projection", projection is not None),
            ("crops", crops > 1),
        ):
            if maps and asked:
                raise ValueError(
                    f"{argument} is for vectors, but pool='none' gives maps of {', '.join(maps)}. "
                    f"Omit {argument}, or pool the maps."
                )
        if fast_decode:
            self.inputs.least_px = resized_px(self.inputs.transform)
        if crops > 1:
            self.inputs.crops, self.inputs.transform = crops, FiveCrops(self.inputs.transform)
        self.row_options = {"output_dtype": output_dtype, "normalize": normalize, "dedup": dedup}
        self.projection = projection
        self.batch_size, self.rows_per_shard = batch_size, rows_per_shard
        self.num_workers, self.progress = num_workers, progress
        self.meta = {
            "model": {"name": name, **model_facts(model)},
            "transform": {
                "text": text_of(self.inputs.transform),
                "data_config": None if transform or not self.inputs.transform else data_config(model),
                **({"fast_decode_px": self.inputs.least_px} if fast_decode else {}),
            },
            "layers": layers,
            "pool": pool,
            "flip": flip,
            "crops": crops,
            "projection": None if projection is None else projection.facts,
            "normalized": normalize,
            "input": {"source": self.inputs.source, "paths_sha256": self.inputs.paths_sha256},
        }
        if projection is not None:
            projection.check({**self.meta, "normalized": False, "projection": None})
        self.num_inputs = None if self.inputs.is_stream else len(self.inputs)
        fingerprint = self.inputs.fingerprint
        if fingerprint is None and out is not None:
            fingerprint = contents_sha256(self.inputs.images, in_memory=self.inputs.in_memory)
        facts = {
            **({"num_shards": len(self.inputs.images)} if self.inputs.is_stream else {}),
            "num_inputs": self.num_inputs,
            "input_fingerprint": fingerprint,
            "rows_per_shard": None if self.inputs.is_stream else rows_per_shard,
            "batch_size": batch_size,
            "dtype": dtype,
            "output_dtype": output_dtype,
            "content_hash": content_hash,
            "dedup": dedup,
            "transform_code_sha256": code_sha256(transform),
            "classes": None if self.inputs.classes is None else list(self.inputs.classes),
            "meta": self.meta,
        }
        self.plan = None if out is None else Plan(out, facts)
        self.retry_damaged = retry_damaged
        if retry_damaged and out is None:
            raise ValueError("retry_damaged needs out=..., the folder whose damaged shards are done again.")

    def in_memory(self) -> Features:
        """Compute everything and keep it."""
        with ExitStack() as stack:
            maker, computation = self._maker(stack, None)
            meta = self._meta(self.meta, computation)
            if self.inputs.is_stream:
                total = len(self.inputs.images)
                shards = ((tar, range(0)) for tar in range(total))
            else:
                total, ids = len(self.inputs), range(len(self.inputs))
                starts = range(0, total, self.rows_per_shard)
                shards = ((k, ids[start : start + self.rows_per_shard]) for k, start in enumerate(starts))
            return gather(self._portions(maker, shards, total), maker, meta)

    def to_folder(self) -> Features:
        """Compute the shards that are missing and fall to this process."""
        with writing(self.plan.folder):
            return self._to_folder(self.plan)

    def _to_folder(self, plan: Plan) -> Features:
        if self.retry_damaged and (names := retry_damaged(plan)):
            _log.info(
                "Reading again what was damaged: %s%s", ", ".join(names[:5]), ", ..." * (len(names) > 5)
            )
        try:
            if not plan.is_complete:
                facts, mine = self._join_in(plan)
                plan.finish(facts)
            if not plan.is_complete:
                left = plan.num_shards - len(plan.done())
                part = Features.of_shards(plan.folder, facts, list(plan.records(mine)))
                _log.warning(
                    "%d of %d shards of '%s' are left to others.", left, plan.num_shards, plan.folder
                )
                return part
        except FileNotFoundError:
            if not plan.is_complete:  # else others have finished it, and removed what served the work
                raise
        plan.clean()
        if self.format is not None:
            change_layout(plan.folder, self.format)
        return Features.open(plan.folder, verify=False)

    def _join_in(self, plan: Plan) -> tuple[dict[str, Any], list[int]]:
        """Do the part of this process; return what every shard says, and the shards that fell to it."""
        with ExitStack() as stack:
            prior = plan.computation()
            maker, computation = self._maker(stack, prior)
            plan.begin()
            agreed = prior or plan.propose(computation)
            if agreed != computation and prior is None:  # another process was faster, and chose otherwise
                maker, computation = self._maker(stack, agreed)
            refuse_to_mix(plan.folder, agreed, computation)
            meta = self._meta(plan.facts["meta"], agreed)
            dtype, classes = plan.facts["output_dtype"], plan.facts["classes"]
            facts = feature_facts(maker.columns, dtype, classes, meta, maker.shapes)
            return facts, self._fill(plan, maker, facts)

    def _fill(self, plan: Plan, maker: RowMaker, facts: dict[str, Any]) -> list[int]:
        """Do what is missing; return the numbers of the shards of this process, done now or before."""
        leases = Leases(plan) if self.share is None else None
        mine = set()

        def free() -> Iterator[tuple[int, range]]:
            todo = plan.todo(self.share)
            start = 0 if leases is None else secrets.randbelow(max(1, len(todo)))  # not all at one place
            for number in [*todo[start:], *todo[:start]]:
                if not plan.is_done(number) and (leases is None or leases.take(number)):
                    mine.add(number)
                    yield number, range(0) if self.inputs.is_stream else plan.ids(number)

        with ExitStack() as stack:
            if leases is not None:
                stack.callback(leases.give_all_back)
            while todo := plan.todo(self.share):
                before = len(mine)
                total = len(todo) if self.inputs.is_stream else sum(len(plan.ids(number)) for number in todo)
                portions = self._portions(maker, free(), total, leases)
                write_shards(portions, plan, facts, maker.extras, leases)
                if len(mine) == before:  # all that is left is in the hands of others
                    time.sleep(_POLL_S)
        i, n = self.share or (0, 1)
        return sorted(mine) if self.share is None else list(range(i, plan.num_shards, n))

    def _maker(self, stack: ExitStack, prior: dict[str, Any] | None) -> tuple[RowMaker, dict[str, Any]]:
        """Return what makes rows, and how it computes: as a former worker did, if there was one."""
        if self.inputs.is_stream:
            items, num_images = first_items(self.inputs), len(self.inputs.images) * _IMAGES_PER_TAR
        else:
            items, num_images = (self.inputs[i] for i in range(self.num_inputs)), self.num_inputs
        # What a program hands over is all of one kind. Of files, the broken ones may come first.
        of_program = not isinstance(self.inputs.images, ImageList | StoredImages | Shards)
        with closing(items):
            pixels = sample(items, self.batch_size, num_images, one_reason_ends=of_program)
        if not isinstance(pixels, torch.Tensor):
            which = "first " if of_program and len(pixels) < num_images else ""
            raise RuntimeError(
                f"None of the {which}{len(pixels)} images gave features:{first_errors(pixels)}"
            )
        network = FrozenNetwork(
            self.model,
            device=self.device,
            compile="auto",
            num_images=num_images,
            choice=None if prior is None else prior["network"],
            **self.network_options,
        )
        chosen = stack.enter_context(network).prepare(pixels)
        _log.info("%s", network)
        maker = RowMaker(self.inputs, network, projection=self.projection, **self.row_options)
        computation = {"device": self.device.type, "network": chosen, "columns": maker.columns}
        return maker, {**computation, "versions": _versions()}

    def _meta(self, planned: dict[str, Any], computation: dict[str, Any]) -> dict[str, Any]:
        computed = {"device": computation["device"], "batch_size": self.batch_size, **computation["network"]}
        return {**planned, "computation": computed, "versions": computation["versions"]}

    def _portions(
        self, maker: RowMaker, shards: Iterable[tuple[int, range]], total: int, leases: Leases | None = None
    ) -> Iterator[Portion]:
        options = {"num_workers": self.num_workers, "device": self.device, "progress": self.progress}
        return load_portions(maker, shards, total, batch_size=self.batch_size, leases=leases, **options)


def _bare(model: Any) -> Any:
    """Return the model inside wrappers; compiling is done here where it pays."""
    while isinstance(model, nn.DataParallel | DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # the first: torch.compile
    return model


def _device(device: str | torch.device | None, model: nn.Module, *, alone: bool) -> torch.device:
    """Return where to compute; processes that torchrun has started share the cards of a machine.

    `alone` is whether this one shares the work with no other.
    """
    shares = not alone and "LOCAL_RANK" in os.environ and torch.cuda.is_available()
    if shares and (device is None or str(device) == "cuda"):
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return choose_device(device, model)


def _versions() -> dict[str, str]:
    return {
        "mocohub": mocohub.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
    }
