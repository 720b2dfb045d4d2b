"""Checkpoint files of other projects: which project's it is, and its ResNet under torchvision's names.

Names of tensors are compared as dotted paths through the whole file, less what DistributedDataParallel and
torch.compile put in between: `{"state_dict": {"module.queue": tensor}}` holds `state_dict.queue`.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mocohub.hub.pickles import open_checkpoint
from mocohub.hub.resnets import detect, sequential_names, torchvision_name


@dataclass(frozen=True)
class Dialect:
    """Where one project keeps its encoders; names are relative to a container."""

    name: str
    written_by: str
    query: str  # what the names of the query encoder's backbone begin with
    key: str | None = None
    heads: tuple[str, ...] = ()  # of the query encoder, projection first, where not beside its backbone
    key_head: str | None = None  # likewise the key encoder's projection
    proof: tuple[str, ...] = ()  # one of these must be there too, where `query` alone could be anybody's
    containers: tuple[str, ...] = ("state_dict.", "model.", "model_state_dict.", "")


# The first that fits is it, so the more particular ones come first.
DIALECTS = (
    Dialect(
        "vissl",
        "VISSL",
        "base_model.model.trunk._feature_blocks.",
        "loss.moco_encoder.trunk._feature_blocks.",
        ("base_model.model.heads.",),
        "loss.moco_encoder.heads.",
        containers=("classy_state_dict.",),
    ),
    Dialect(
        "pycontrast",
        "PyContrast",
        "model.encoder.",
        "model_ema.encoder.",
        ("model.head.", "model.head_jig."),
        "model_ema.head.",
        containers=("",),
    ),
    Dialect("moco-v3", "facebookresearch/moco-v3", "base_encoder.", "momentum_encoder.", ("predictor.",)),
    Dialect("notebook", "the CIFAR-10 notebook of MoCo's authors", "encoder_q.net.", "encoder_k.net."),
    Dialect(
        "mmselfsup",
        "mmselfsup 0.x (or OpenSelfSup)",
        "encoder_q.0.",
        "encoder_k.0.",
        ("encoder_q.1.",),
        "encoder_k.1.",
    ),
    Dialect("official", "facebookresearch/moco", "encoder_q.", "encoder_k."),
    Dialect(
        "mmselfsup",
        "mmselfsup 1.x",
        "backbone.",
        "encoder_k.0.",
        ("neck.",),
        "encoder_k.1.",
        proof=("encoder_k.", "neck."),
    ),
    # Early versions of lightly's benchmark call the moving average `backbone`.
    Dialect(
        "lightly", "lightly", "query_backbone.", "backbone.", ("query_projection_head.",), "projection_head."
    ),
    Dialect(
        "lightly",
        "lightly",
        "backbone.",
        "key_backbone.",
        ("projection_head.",),
        "key_projection_head.",
        proof=("key_backbone.", "key_projection_head."),
    ),
    Dialect(
        "lightly",
        "lightly",
        "backbone.",
        "backbone_momentum.",
        ("projection_head.",),
        "projection_head_momentum.",
        proof=("backbone_momentum.", "projection_head."),
    ),
    Dialect(
        "solo-learn",
        "solo-learn",
        "backbone.",
        "momentum_backbone.",
        ("projector.",),
        "momentum_projector.",
        proof=("momentum_backbone.", "projector."),
    ),
    Dialect(
        "solo-learn",
        "solo-learn before 1.0.3",
        "encoder.",
        "momentum_encoder.",
        ("projector.",),
        "momentum_projector.",
        proof=("momentum_encoder.", "projector."),
    ),
    Dialect("plain", "torchvision, timm or a tool that keeps their names", "backbone."),
    Dialect("plain", "torchvision, timm or a tool that keeps their names", ""),
)

ACCEPTED = """a file of torch.save, or .safetensors, with the state of a ResNet trained by
    facebookresearch/moco     state_dict: module.encoder_q.conv1.weight, ... (with or without 'module.')
    its CIFAR-10 notebook     state_dict: encoder_q.net.0.weight, ...
    facebookresearch/moco-v3  state_dict: module.base_encoder.conv1.weight, ...
    PyContrast                model: module.encoder.conv1.weight, ...; model_ema: encoder.conv1.weight, ...
    VISSL                     classy_state_dict: base_model: model: trunk: _feature_blocks.conv1.weight, ...
    mmselfsup                 state_dict: backbone.conv1.weight, ... or encoder_q.0.conv1.weight, ...
    solo-learn, lightly       state_dict: backbone.conv1.weight, ... beside momentum_backbone or key_backbone
    torchvision or timm       conv1.weight, ..., or stem.conv.weight, ... of timm's resnetv2"""


# Left behind with a note; whatever else stands beside a backbone's tensors makes it another network.
_HEADS = ("fc", "head", "heads", "classifier", "last_linear")
_WRAPPERS = ("module", "_orig_mod")


@dataclass(frozen=True)
class Foreign:
    """One backbone from a file of another project."""

    dialect: Dialect
    tensors: dict[str, Tensor]  # by torchvision's names, without head or classifier
    backbone: str  # a key of BACKBONES, as `resnets.detect` tells it
    model_args: dict[str, Any]
    encoders: list[str]  # those in the file: "query", "key"
    head: str | None  # of the query encoder, "linear" or "mlp"; None if the file has no projection
    projection: dict[str, Tensor]  # of this encoder; {} if the file has none, or it is not asked for
    left_out: dict[str, int]  # by group, how many of the file's other tensors it holds
    content: Mapping[Any, Any]  # the file's top level


def read_foreign(path: Path, encoder: str, *, head: bool = False) -> Foreign:
    """Read the backbone of one encoder from a checkpoint file of any of `DIALECTS`.

    Args:
        path: A file that torch.save wrote, in any of its formats, or a safetensors file.
        encoder: "query" or "key".
        head: Read its projection head too.

    Raises:
        ValueError: If the file is damaged, is of none of these dialects, names code, or has no such encoder.
    """
    content = open_checkpoint(path)
    tensors = dict(_flatten(content, path))
    found = _recognise(tensors, path)
    if found is None:
        raise _unreadable(path, content)
    dialect, container = found
    prefixes = {"query": container + dialect.query}
    if dialect.key is not None and _has_stem(tensors, container + dialect.key):
        prefixes["key"] = container + dialect.key
    if encoder not in prefixes:
        raise ValueError(
            f"'{path}' holds no key encoder: it is of {dialect.written_by} and has the query encoder alone. "
            "Omit encoder='key'."
        )
    prefix = prefixes[encoder]
    backbone = {tv: full for tv, full in _named(tensors, prefix) if tv.split(".")[0] not in _HEADS}
    beside = {full for tv, full in _named(tensors, prefixes["query"]) if tv.split(".")[0] in _HEADS}
    apart = tuple(container + head for head in dialect.heads)
    try:
        shapes = {tv: tuple(tensors[full].shape) for tv, full in backbone.items()}
        name, model_args = detect(shapes)
    except ValueError as error:
        raise _unreadable(path, content, f" ({error})") from None
    except (LookupError, ZeroDivisionError):
        raise _unreadable(path, content) from None
    if dialect.name == "solo-learn" and shapes["conv1.weight"][-1] == 3:
        raise ValueError(
            f"'{path}' is a solo-learn model for small images. Its 3x3 stem pads by 2 pixels, which no model "
            "of timm does: it would load, and give other features. Give one that was trained at 224 px."
        )
    heads = [t for full, t in tensors.items() if full in beside or full.startswith(apart)]
    own_head = next(iter(dialect.heads), None) if encoder == "query" else dialect.key_head
    if not head or dialect.name == "plain":  # whose fc is a classifier
        projection = {}
    elif own_head is None:
        projection = {tv: full for tv, full in _named(tensors, prefix) if tv.split(".")[0] in _HEADS}
    else:
        own_head = container + own_head
        projection = {full.removeprefix(own_head): full for full in tensors if full.startswith(own_head)}
    others = [*(p for p in prefixes.values() if p != prefix), *apart]
    return Foreign(
        dialect=dialect,
        tensors={tv: _plain(tensors[full], full, path) for tv, full in backbone.items()},
        backbone=name,
        model_args=model_args,
        encoders=list(prefixes),
        projection={name: _plain(tensors[full], full, path) for name, full in projection.items()},
        head=_kind(heads) if dialect.name != "plain" else None,
        left_out=_groups(tensors.keys() - set(backbone.values()), container, prefix, others),
        content=content if isinstance(content, Mapping) else {},
    )


def _flatten(content: Any, path: Path, wrappers: tuple[str, ...] = _WRAPPERS) -> Iterator[tuple[str, Tensor]]:
    """Give every tensor with its dotted path, each mapping once however often it is referred to."""
    pending, met, names = [((), content)], set(), set()
    while pending:
        parts, value = pending.pop()
        if isinstance(value, Tensor):
            name = ".".join(part for part in parts if part not in wrappers)
            if name in names:
                raise ValueError(f"'{path}' holds '{name}' twice: with 'module.' before it and without.")
            names.add(name)
            yield name, value
        elif isinstance(value, Mapping) and id(value) not in met and len(parts) < 64:
            met.add(id(value))
            children = [((*parts, *str(key).split(".")), child) for key, child in value.items()]
            pending += reversed(children)  # so that they come out in the file's order


def _recognise(tensors: Mapping[str, Tensor], path: Path) -> tuple[Dialect, str] | None:
    for dialect in DIALECTS:
        for container in dialect.containers:
            proven = not dialect.proof or any(
                name.startswith(tuple(container + proof for proof in dialect.proof)) for name in tensors
            )
            if proven and _has_stem(tensors, container + dialect.query):
                return dialect, container
    if any(".patch_embed." in f".{name}" for name in tensors):
        raise ValueError(
            f"'{path}' holds a vision transformer, as MoCo v3 trained them too. mocohub reads ResNets: give "
            "a ResNet's checkpoint, such as r-50-1000ep.pth.tar of MoCo v3."
        )
    return None


def _unreadable(path: Path, content: Any, reason: str = "") -> ValueError:
    seen = [name for name, _ in itertools.islice(_flatten(content, path, wrappers=()), 5) if name]
    if not seen:
        seen = [str(key) for key in content][:5] if isinstance(content, Mapping) else type(content).__name__
    return ValueError(
        f"'{path}' holds no ResNet this can read{reason}. Its first keys: {seen}.\n"
        f"What is accepted: {ACCEPTED}\nOf mocohub's own runs, checkpoints and models, give the folder: the "
        "one with run.json, state.json or mocohub.json."
    )


def _has_stem(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(prefix + stem in tensors for stem in ("conv1.weight", "0.weight", "stem.conv.weight"))


def _named(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, str]]:
    """Give torchvision's name and the name in the file of each tensor under a prefix."""
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    numbered = sequential_names(names) if "0.weight" in names else {}
    for name in names:
        yield numbered.get(name, torchvision_name(name)), prefix + name


def _plain(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return a tensor as float32 (counts as int64), once it is sure that its values are all in the file."""
    count = name.endswith("num_batches_tracked")
    right = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    right = right and (count or tensor.is_floating_point())
    if not right or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"'{name}' in '{path}' is no ordinary tensor of floats. Save the plain weights.")
    return tensor.detach().to(torch.int64 if count else torch.float32).contiguous()


def _kind(head: list[Tensor]) -> str | None:
    layers = sum(tensor.ndim == 2 for tensor in head)
    return "mlp" if layers > 1 else "linear" if layers else None


def _groups(names: Iterable[str], container: str, prefix: str, others: list[str]) -> dict[str, int]:
    """Count the tensors that are left out by what they belong to, most first."""

    def group(name: str) -> str:
        if name.startswith(prefix):
            found = prefix + name.removeprefix(prefix).split(".")[0]
        else:
            found = next((other for other in others if name.startswith(other)), None)
            found = found or name.removeprefix(container).split(".")[0]
        return found.removeprefix(container).rstrip(".")

    return dict(Counter(sorted(map(group, names))).most_common())
