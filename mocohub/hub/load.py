"""One call from a name, a folder or a file to a timm backbone that is ready to make features."""

import errno
import itertools
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, is_offline_mode
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mocohub.errors import unknown
from mocohub.files import read_json, remove_folder
from mocohub.hub.encoders import ENCODERS, no_head, no_head_in_export, read_encoder
from mocohub.hub.fetch import locked, snapshot
from mocohub.hub.heads import CONTRASTIVE, head_of
from mocohub.hub.verified import cache_folder, sha256_once, stated_sha256
from mocohub.hub.web import download
from mocohub.hub.zoo import ZOO, ZooModel

_LOG = logging.getLogger(__name__)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE = re.compile(r"\.(pth|pt|tar|ckpt|bin|torch|pkl|safetensors)$", re.IGNORECASE)
_AUTHORS_HOST = "https://dl.fbaipublicfiles.com"


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    encoder: str = "query",
    head: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    offline: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """Return a timm backbone with pre-trained weights, in eval mode and without classifier.

    Its `pretrained_cfg` states the preprocessing it was trained for, see `transform`. A name is looked for
    among the models that come with this package, then on the disk, then on the Hub; a zoo model that is in
    none of these places is made from its authors' file, once. Files from the Hub all come from one commit and
    have the SHA-256 which the model's manifest and the Hub state; pickles are never fetched from there.

    Args:
        name_or_path: An exported folder, a training run or one of its checkpoints; a checkpoint file of other
            projects, see `mocohub.hub.encoders`; `org/name` or `org/name@revision` on the Hub, with or
            without `hf-hub:` before it; or a zoo model: `moco_tiny_cifar10` needs no network, others such as
            `moco_r50_in1m` are looked for in the namespace `mocohub` or the one that the environment variable
            MOCOHUB_NAMESPACE names.
        revision: Branch, tag or commit on the Hub; the default branch if None. With a full commit that is in
            the cache, nothing is asked of the Hub.
        encoder: "query", or "key" for the moving average, which only runs and checkpoints hold besides.
        head: Keep the projection head as the module `contrastive` of the model: `model.contrastive(model(x))`
            are the embeddings (N, 128) of unit length that the contrastive loss compares, and
            `mocohub.extract(model, images, layers=["contrastive"])` extracts them. Only runs, checkpoints and
            checkpoint files of other projects hold it.
        device: Where the model shall be.
        dtype: Of its parameters; as stored (float32) if None.
        offline: Whether to use only what is on this disk, as HF_HUB_OFFLINE=1 does.
        **timm_kwargs: Passed to `timm.create_model`, which adapts the weights: `in_chans`, `features_only`,
            `out_indices`, `output_stride`, `global_pool`, `num_classes`, ...

    Returns:
        A module from images (N, 3, H, W) to pooled features (N, model.num_features).

    Raises:
        FileNotFoundError: If a path or a repository does not exist, or a zoo model has no weights yet.
        ValueError: If a name is unknown, or what is found holds no such model, or not the head.
        PermissionError: If the Hub refuses the files.
        ConnectionError: If the Hub cannot be reached or goes on failing.
        RuntimeError: If the weights fail their checksum.
    """
    if encoder not in ENCODERS:
        raise unknown("encoder", encoder, ENCODERS)
    if head and timm_kwargs.get("features_only"):
        raise ValueError(
            "head=True needs pooled features, but features_only=True gives maps. Omit one of them."
        )
    path = _locate(name_or_path, revision, encoder, offline or is_offline_mode(), head=head)
    timm_kwargs = {"num_classes": 0, **timm_kwargs}
    if (path / "config.json").is_file():
        if head:
            raise no_head_in_export(path)
        model = _from_folder(path, encoder, timm_kwargs)
    else:
        found = read_encoder(path, encoder=encoder, head=head)
        kwargs = {**found.model_args, **timm_kwargs, "pretrained_cfg": found.pretrained_cfg}
        with _timm_at_work(path):
            model = _assigned(found.architecture, found.state_dict, kwargs)
            if model is None:
                weights = {"state_dict": found.state_dict}
                model = timm.create_model(
                    found.architecture, pretrained=True, pretrained_cfg_overlay=weights, **kwargs
                )
                del model.pretrained_cfg["state_dict"]  # timm keeps it there: a second copy of all weights
        if head:
            model.add_module(CONTRASTIVE, head_of(found.head, found.num_features, path))
    return model.to(device=device, dtype=dtype).eval()


def transform(model: nn.Module) -> Any:
    """Return the transform from a PIL image in mode RGB to the model's input (3, H, W), for evaluation.

    Args:
        model: From `load`, or any timm model.

    Raises:
        ValueError: If the model does not say which preprocessing it needs.
    """
    if not getattr(model, "pretrained_cfg", None):
        raise ValueError(
            f"{type(model).__name__} has no pretrained_cfg, which states its preprocessing. "
            "Give a model from mocohub.load or timm.create_model, not a module that wraps one."
        )
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


def local_copy(source: str | Path, encoder: str = "query") -> Path:
    """Return a name of the zoo, or `hf-hub:org/name`, as a folder on this disk; a path stays as it is.

    Raises:
        As `load`.
    """
    name = str(source)
    is_name = isinstance(source, str) and (name in ZOO or name.startswith("hf-hub:"))
    return _locate(name, None, encoder, is_offline_mode()) if is_name else Path(source)


def _from_folder(path: Path, encoder: str, timm_kwargs: dict[str, Any]) -> nn.Module:
    weights = path / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"'{path}' has no model.safetensors; weights in other formats are not opened.")
    if reason := _damage(path):
        raise RuntimeError(f"'{path}' is damaged: {reason}. Fetch or export it again.")
    manifest = read_json(path / "mocohub.json") if (path / "mocohub.json").is_file() else {}
    if encoder == "key" and manifest.get("encoder") != "key":
        raise ValueError(
            f"'{path}' holds no key encoder: only training runs and checkpoints hold both. "
            "Export one with encoder='key', or omit the argument."
        )
    name = f"local-dir:{path}"
    with _timm_at_work(path):
        # Our own files hold exactly what the network has; those of others timm may have to translate.
        model = _assigned(name, load_file(weights), timm_kwargs) if manifest else None
        if model is None:
            model = timm.create_model(name, pretrained=True, **timm_kwargs)
        return model


def _damage(folder: Path) -> str | None:
    """Say in what an exported folder contradicts its manifest; what has not changed is not hashed again."""
    stated = stated_sha256(folder)
    for name in ("config.json", "model.safetensors"):
        if name in stated and (found := sha256_once(folder / name)) != stated[name]:
            return f"{name} has SHA-256 {found}, mocohub.json says {stated[name]}"
    return None


def _assigned(name: str, tensors: Mapping[str, Tensor], kwargs: dict[str, Any]) -> nn.Module | None:
    """Return timm's network around these very tensors, which stay where they are: in the mapped file.

    Returns:
        None if they are not exactly the network's, so that timm must adapt them (other channels, classes,
        layers, dtypes), or if the network has something that no file holds.
    """
    if any(t.is_floating_point() and t.dtype != torch.get_default_dtype() for t in tensors.values()):
        return None
    model = timm.create_model(name, pretrained=False, device="meta", **kwargs)
    try:
        model.load_state_dict(tensors, assign=True)  # strict
    except RuntimeError:
        return None
    whole = not any(t.is_meta for t in itertools.chain(model.parameters(), model.buffers()))
    return model if whole else None


@contextmanager
def _timm_at_work(path: Path) -> Iterator[None]:
    """Turn whatever timm and safetensors let out into an error that says whose fault it is."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"The weights in '{path}' are no safetensors file, or cut: {error}") from error
    except OSError:
        raise
    except Exception as error:
        raise ValueError(
            f"timm cannot build what '{path}' describes with these arguments: {type(error).__name__}: "
            f"{str(error)[:1000]}"
        ) from None


def _locate(
    name_or_path: str | Path, revision: str | None, encoder: str, offline: bool, *, head: bool = False
) -> Path:
    """Return the local path, or the local copy of what the Hub or the authors have under that name.

    With `head` nothing is fetched, since no published model has one.
    """
    name = str(name_or_path)
    local = Path(name).expanduser()
    repository, _, pinned = name.removeprefix("hf-hub:").partition("@")
    model = ZOO.get(repository)
    if model and model.bundled and not (isinstance(name_or_path, Path) and local.exists()):
        if revision or pinned:
            raise ValueError(
                f"{repository} comes with mocohub, in one version. Omit the revision {revision or pinned!r}."
            )
        if local.exists():
            _LOG.warning("'%s' is the model that comes with mocohub; './%s' is what stands here.", name, name)
        return model.bundled_folder
    if local.exists():
        if revision is not None:
            raise ValueError(f"'{name}' is on this disk, and revision={revision!r} is for the Hub. Omit it.")
        return local
    if pinned and revision and pinned != revision:
        raise ValueError(f"'{name}' and revision={revision!r} name two revisions. Give one of them.")
    revision = revision or pinned or None
    if model and head:
        file = f"Fetch {model.weights_url} and" if model.weights_url else f"Train {model.name} and"
        raise no_head(f"What '{name}' names is an exported model and", f"{file} give that.")
    if model:
        return _zoo_model(model, revision, encoder, offline)
    is_path = isinstance(name_or_path, Path) or bool(_FILE.search(repository))
    if not is_path and _REPOSITORY.fullmatch(repository):
        if head:
            remedy = "If its training state is published with it, fetch that folder and give it."
            raise no_head(
                f"'{name}' is no path on this disk; what the Hub has under it is an exported model and",
                remedy,
            )
        try:
            return _from_hub(repository, revision, offline)
        except (FileNotFoundError, ConnectionError) as error:
            raise type(error)(f"'{name}' is no path on this disk. {error}") from error
    if is_path or re.search(r"[/\\~]", repository):
        raise FileNotFoundError(
            f"'{name}' does not exist on this disk. A model on the Hub is named org/name."
        )
    if published := _timm_repository(name):
        raise ValueError(
            f"'{name}' is an architecture of timm. Its weights are on the Hub: give {published}, or, in "
            f"Python, the module: timm.create_model('{name}', pretrained=True)."
        )
    raise ValueError(
        f"{unknown('model', name, ZOO)} Or give org/name on the Hub, a folder, or a checkpoint file."
    )


def _timm_repository(name: str) -> str | None:
    """Return the repository of the weights that timm would take for one of its names; None if unknown."""
    return timm.get_pretrained_cfg(name).hf_hub_id if timm.models.is_model_pretrained(name) else None


def _from_hub(repository: str, revision: str | None, offline: bool) -> Path:
    folder = snapshot(repository, revision=revision, offline=offline)
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{repository}' has no config.json: it is not a timm model.")
    return folder


def _zoo_model(model: ZooModel, revision: str | None, encoder: str, offline: bool) -> Path:
    """Return a zoo model's folder: from the namespace on the Hub, else made from the authors' file."""
    try:
        return _from_hub(model.repository, revision, offline)
    except (FileNotFoundError, ConnectionError) as error:
        if model.weights_url and revision is None:
            _LOG.info("%s Using the authors' file.", error)
            return _converted(model, encoder, offline)
        if model.weights_url or offline or isinstance(error, ConnectionError):
            raise
        raise FileNotFoundError(
            f"'{model.name}' is not published as '{model.repository}' on {constants.ENDPOINT}, and its "
            f"authors released no weights. `mocohub pretrain {model.name} --data IMAGES --out RUN` trains it "
            f"({model.cost}). Then mocohub.load('RUN') works, and its name too, once `mocohub publish` has "
            "made that repository."
        ) from error


def _converted(model: ZooModel, encoder: str, offline: bool) -> Path:
    """Return an export of the authors' file from our cache, made at the first call.

    MOCOHUB_WEIGHTS_URL names a mirror of the authors' host.
    """
    from mocohub.hub.export import export  # which imports this module

    url = model.weights_url.replace(
        _AUTHORS_HOST, os.environ.get("MOCOHUB_WEIGHTS_URL", _AUTHORS_HOST).rstrip("/"), 1
    )
    folder = cache_folder() / "models" / f"{model.name}-{model.weights_md5}-{encoder}"
    if _is_intact(folder):
        return folder
    if offline:
        raise FileNotFoundError(
            f"'{model.name}' is not in the cache '{cache_folder()}', and offline nothing is fetched. Fetch "
            f"{url} where there is a network, then mocohub.load(FILE)."
        )
    with locked(folder):
        if _is_intact(folder):  # made by another process meanwhile
            return folder
        remove_folder(folder)
        with tempfile.TemporaryDirectory(
            prefix=f".{model.name}.", suffix=".partial", dir=folder.parent
        ) as temporary:
            file = download(url, Path(temporary), md5=model.weights_md5)
            try:
                export(file, folder, license="other", name=model.name, encoder=encoder)
            except OSError as error:  # where locks lie, another process may have been faster
                if error.errno not in (None, errno.EEXIST, errno.ENOTEMPTY) or not _is_intact(folder):
                    raise
    return folder


def _is_intact(folder: Path) -> bool:
    try:
        return (folder / "mocohub.json").is_file() and _damage(folder) is None
    except (OSError, ValueError):
        return False
