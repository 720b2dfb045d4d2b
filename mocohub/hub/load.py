"""One call from a name, a folder or a file to a timm backbone that is ready to make features."""

import logging
import os
import re
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from torch import nn

import mocohub
from mocohub.errors import unknown
from mocohub.hub.encoders import ENCODERS, check_export, read_encoder
from mocohub.hub.zoo import ZOO, ZooModel

_LOG = logging.getLogger(__name__)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FILE = re.compile(r"\.(pth|pt|tar|ckpt|bin|torch|pkl|safetensors)$", re.IGNORECASE)


def load(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    encoder: str = "query",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Return a timm backbone with pre-trained weights, in eval mode and without classifier.

    Its `pretrained_cfg` states the preprocessing it was trained for, see `transform`. A name is looked for
    among the models that come with this package, then on the disk, then on the Hub. Files from the Hub all
    come from one commit, and the weights must have the SHA-256 which the model's manifest states; pickles are
    never fetched.

    Args:
        name_or_path: An exported folder, a training run or one of its checkpoints; a checkpoint file of the
            official MoCo v1 or v2 code; `org/name` or `org/name@revision` on the Hub, with or without
            `hf-hub:` before it; or a zoo model: `moco_tiny_cifar10` needs no network, others such as
            `moco_r50_in1m` are looked for in the namespace `mocohub` or the one that the environment variable
            MOCOHUB_NAMESPACE names.
        revision: Branch, tag or commit on the Hub; the default branch if None.
        encoder: "query", or "key" for the moving average, which only runs and checkpoints hold besides.
        device: Where the model shall be.
        dtype: Of its parameters; as stored (float32) if None.
        **timm_kwargs: Passed to `timm.create_model`, which adapts the weights: `in_chans`, `features_only`,
            `out_indices`, `output_stride`, `global_pool`, `num_classes`, ...

    Returns:
        A module from images (N, 3, H, W) to pooled features (N, model.num_features).

    Raises:
        FileNotFoundError: If a path or a repository does not exist, or a zoo model has no weights yet.
        ValueError: If a name is unknown, or what is found holds no such model.
        RuntimeError: If the weights fail their checksum.
    """
    if encoder not in ENCODERS:
        raise unknown("encoder", encoder, ENCODERS)
    path = _locate(name_or_path, revision)
    timm_kwargs = {"num_classes": 0, **timm_kwargs}
    if (path / "config.json").is_file():
        if not (path / "model.safetensors").is_file():
            raise ValueError(f"'{path}' has no model.safetensors; weights in other formats are not opened.")
        check_export(path, encoder)
        model = timm.create_model(f"local-dir:{path}", pretrained=True, **timm_kwargs)
    else:
        found = read_encoder(path, encoder=encoder)
        model = timm.create_model(
            found.architecture,
            pretrained=True,
            pretrained_cfg=found.pretrained_cfg,
            pretrained_cfg_overlay={"state_dict": found.state_dict},
            **{**found.model_args, **timm_kwargs},
        )
        del model.pretrained_cfg["state_dict"]  # timm keeps it there: a second copy of all weights
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


def _locate(name_or_path: str | Path, revision: str | None) -> Path:
    """Return the local path, or the local copy of what the Hub has under that name."""
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
    if model:
        return _download_zoo_model(model, revision or pinned or None)
    is_path = isinstance(name_or_path, Path) or bool(_FILE.search(repository))
    if not is_path and _REPOSITORY.fullmatch(repository):
        try:
            return _download(repository, revision or pinned or None)
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"'{name}' is neither a path on this disk nor a model on {constants.ENDPOINT}. "
                "If it is private or gated, log in with `hf auth login`."
            ) from error
    if is_path or re.search(r"[/\\~]", repository):
        raise FileNotFoundError(
            f"'{name}' does not exist on this disk. A model on the Hub is named org/name."
        )
    raise ValueError(
        f"{unknown('model', name, ZOO)} Or give org/name on the Hub, a folder, or a checkpoint file."
    )


def _download_zoo_model(model: ZooModel, revision: str | None) -> Path:
    repository = f"{os.environ.get('MOCOHUB_NAMESPACE', 'mocohub')}/{model.name}"
    try:
        return _download(repository, revision)
    except (RepositoryNotFoundError, LocalEntryNotFoundError) as error:
        if model.weights_url:
            remedy = (
                f"The authors' file is {model.weights_url} (MD5 {model.weights_md5}...). "
                "Download it, then mocohub.load(FILE)."
            )
        else:
            remedy = (
                "Nobody has published its weights. Train it, then mocohub.load(RUN): "
                f"`mocohub info {model.name}` says how the paper did, `mocohub list` which recipes there are."
            )
        raise FileNotFoundError(
            f"'{model.name}' could not be fetched as '{repository}' from {constants.ENDPOINT} "
            f"({type(error).__name__}). {remedy}"
        ) from error


def _download(repository: str, revision: str | None) -> Path:
    """Fetch one commit's configuration, weights and manifest; the Hub is asked once which commit that is."""
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=["config.json", "model.safetensors", "mocohub.json"],
            library_name="mocohub",
            library_version=mocohub.__version__,
        )
    except RevisionNotFoundError as error:
        raise ValueError(
            f"'{repository}' has no revision '{revision}'. Give a branch, a tag or a full commit, or none."
        ) from error
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"'{repository}' has no config.json: it is not a timm model.")
    return Path(folder)
