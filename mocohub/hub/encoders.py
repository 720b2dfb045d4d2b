"""Find the encoder in whatever holds one: a run, a checkpoint, an exported folder, a file of another project.

All of them become one `Encoder`: tensors under timm's names, what builds the network, what prepares its
images, and the facts a model card states. Here only safetensors and JSON are read; `dialects.py` reads the
files of others.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mocohub.backbones import BACKBONES, backbone, pretrained_cfg
from mocohub.errors import unknown
from mocohub.files import damage, read_json
from mocohub.hub.dialects import ACCEPTED, read_foreign
from mocohub.hub.pickles import checksums
from mocohub.hub.resnets import resnetv2_name, torchvision_name
from mocohub.hub.zoo import ZOO

logger = logging.getLogger(__name__)

ENCODERS = ("query", "key")
EXPORT_FORMAT = "mocohub-export/1"
CHECKPOINT_FORMAT = "mocohub-checkpoint/1"
# What an exported folder's manifest repeats of an encoder's history.
FACTS = (
    "recipe_name",
    "recipe",
    "data",
    "datasets",
    "steps",
    "epochs",
    "num_images_seen",
    "started",
    "versions",
    "commit",
    "origin",
    "license_statement",
)

_LAYOUTS = f"""What is accepted:
  - a training run of mocohub (a folder with run.json)
  - one of its checkpoints (a folder with state.json and state.safetensors)
  - an exported model (a folder with config.json, model.safetensors and mocohub.json)
  - {ACCEPTED}"""
# Of the CIFAR-10 notebook; others' small-image models do not state theirs.
_CIFAR_CFG = {
    "crop_px": 32,
    "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2023, 0.1994, 0.2010),
}


@dataclass(frozen=True, eq=False)
class Encoder:
    """One encoder, its projection head apart or left out, and all that is known about it."""

    kind: str  # "run", "checkpoint", "export", or the name of a dialect: "official", "vissl", ...
    backbone: str  # the key of BACKBONES it is, or of which `model_args` make it a variant
    architecture: str  # timm's name
    model_args: dict[str, Any]  # complete: `timm.create_model(architecture, **model_args)`
    num_features: int
    state_dict: dict[str, Tensor]  # timm's names; on the CPU
    pretrained_cfg: dict[str, Any]  # the preprocessing, in timm's terms
    facts: dict[str, Any]  # those of FACTS that are known
    head: dict[str, Tensor] = field(default_factory=dict)  # see `read_encoder`; by names in their order

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """The same tensors under torchvision's names, which wide networks do not have in timm."""
        return {torchvision_name(name): tensor for name, tensor in self.state_dict.items()}


def read_encoder(path: str | Path, *, encoder: str = "query", head: bool = False) -> Encoder:
    """Read one encoder and check, on the meta device, that its tensors are exactly those of its network.

    Args:
        path: A training run (its newest checkpoint that passes its checksum), a checkpoint folder, an
            exported folder, or a checkpoint file of another project, see `dialects.DIALECTS`.
        encoder: "query", or "key" for the moving average; exported folders and some files hold only one.
        head: Read the tensors of its projection head too.

    Raises:
        FileNotFoundError: If nothing is at `path`.
        ValueError: If it is none of the accepted layouts, or `encoder` or its head is not in it.
        RuntimeError: If a checksum fails and there is no earlier checkpoint to fall back to.
    """
    path = Path(path)
    if encoder not in ENCODERS:
        raise unknown("encoder", encoder, ENCODERS)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if path.is_file():
        return _read_file(path, encoder, head)
    with _understood(path):
        return _read_folder(path, encoder, head)


def no_head(what: str, remedy: str) -> ValueError:
    """Say that `what` holds no projection head, and what does."""
    return ValueError(
        f"{what} holds no projection head, which the contrastive embedding needs. {remedy} Training runs and "
        "their checkpoints hold one, and so do checkpoint files of MoCo v1 and v2 of facebookresearch/moco, "
        "VISSL, mmselfsup, PyContrast, solo-learn and lightly."
    )


def _read_folder(path: Path, encoder: str, head: bool) -> Encoder:
    if not path.is_dir():
        raise ValueError(f"'{path}' is neither a file nor a folder.")
    if (path / "run.json").is_file():
        newest = newest_checkpoint(path)
        if newest is None:
            raise ValueError(f"Run '{path}' has no checkpoint yet: training has to go on for a while.")
        return _read_checkpoint(newest, encoder, "run", head)
    if (path / "state.json").is_file():
        if reason := damage(path, "state.json", "state.safetensors"):
            raise RuntimeError(f"Checkpoint '{path}' is damaged: {reason}. Use an earlier one of its run.")
        return _read_checkpoint(path, encoder, "checkpoint", head)
    if (path / "mocohub.json").is_file():
        if head:
            raise no_head_in_export(path)
        return _read_export(path, encoder)
    names = sorted(child.name for child in path.iterdir())[:5]
    raise ValueError(f"'{path}' holds no model this can read. It holds: {names}.\n{_LAYOUTS}")


def newest_checkpoint(run: Path) -> Path | None:
    """Return the newest checkpoint folder of a run that passes its checksum, None if there are none at all.

    Raises:
        RuntimeError: If there are checkpoints and all are damaged.
    """
    reasons = []
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        reason = damage(folder, "state.json", "state.safetensors")
        if reason is None:
            return folder
        logger.warning("Checkpoint '%s' is damaged (%s): trying the one before.", folder, reason)
        reasons.append(f"{folder.name}: {reason}")
    if reasons:
        raise RuntimeError(f"No checkpoint of run '{run}' is intact: {'; '.join(reasons)}.")
    return None


def check_export(folder: Path, encoder: str) -> dict[str, Any]:
    """Return an exported folder's manifest ({} if another tool wrote the folder) once its weights match it.

    Raises:
        ValueError: If the key encoder is asked for and the folder holds the query encoder.
        RuntimeError: If the weights are not those the manifest describes.
    """
    has_manifest = (folder / "mocohub.json").is_file()
    manifest = read_json(folder / "mocohub.json") if has_manifest else {}
    if encoder == "key" and manifest.get("encoder") != "key":
        raise ValueError(
            f"'{folder}' holds no key encoder: only training runs and checkpoints hold both. "
            "Export one with encoder='key', or omit the argument."
        )
    if has_manifest and (reason := damage(folder, "mocohub.json", "model.safetensors")):
        raise RuntimeError(f"The weights in '{folder}' are damaged: {reason}. Fetch or export them again.")
    return manifest


def no_head_in_export(folder: Path) -> ValueError:
    """Say that an exported folder has left its head behind, and where."""
    manifest = read_json(folder / "mocohub.json") if (folder / "mocohub.json").is_file() else {}
    known = manifest if isinstance(manifest, dict) else {}
    remedy = "Give what it was exported from."
    if (folder / "training-state" / "state.json").is_file():
        remedy = f"Give '{folder / 'training-state'}', which was published with it."
    elif isinstance(known.get("origin"), dict):
        remedy = f"Give the file '{known['origin'].get('file')}', from which it was exported."
    elif "recipe_name" in known:
        started = f", which was started {known['started']}" if "started" in known else ""
        remedy = f"Give the run of {known['recipe_name']}{started}, from which it was exported"
        remedy += f" (step {known['steps']})." if "steps" in known else "."
    return no_head(f"'{folder}' is an exported model and", remedy)


def _read_checkpoint(folder: Path, encoder: str, kind: str, head: bool) -> Encoder:
    state = read_json(folder / "state.json")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"'{folder}' is of format {state.get('format')!r}: this reads {CHECKPOINT_FORMAT!r}."
        )
    prefix, head_prefix = f"{encoder}.backbone.", f"{encoder}.head."
    with safe_open(folder / "state.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        names = [name for name in file.keys() if head and name.startswith(head_prefix)]
        head_tensors = {name.removeprefix(head_prefix): file.get_tensor(name) for name in names}
    recipe = state["recipe"]
    spec = backbone(recipe["backbone"])
    model_args = {**spec.model_args, **recipe.get("model_args", {})}
    facts = {
        "recipe_name": state["recipe_name"],
        "recipe": recipe,
        "steps": state["step"],
        "epochs": state["epoch"],
        "num_images_seen": state["num_images_seen"],
    }
    run_file = folder.parent.parent / "run.json"
    if run_file.is_file():
        run = read_json(run_file)
        facts |= {name: run[name] for name in ("started", "versions", "commit") if run.get(name)}
        facts["data"] = {name: run["data"][name] for name in ("source", "num_images", "paths_sha256")}
        # Only the last component: a card must not publish where somebody keeps their images.
        facts["data"]["source"] = Path(run["data"]["source"]).name
    model = _fit(tensors, spec.architecture, model_args, folder)
    return Encoder(
        kind=kind,
        backbone=recipe["backbone"],
        architecture=spec.architecture,
        model_args=model_args,
        num_features=model.num_features,
        state_dict=model.state_dict(),
        pretrained_cfg=pretrained_cfg(
            recipe["backbone"],
            crop_px=recipe["crop_px"],
            crop_pct=recipe["eval_crop_pct"],
            mean=recipe["mean"],
            std=recipe["std"],
        ),
        facts=facts,
        head=head_tensors,
    )


def _read_export(folder: Path, encoder: str) -> Encoder:
    manifest = check_export(folder, encoder)
    if manifest.get("format") != EXPORT_FORMAT:
        raise ValueError(f"'{folder}' is of format {manifest.get('format')!r}: this reads {EXPORT_FORMAT!r}.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' has no config.json, which states the preprocessing. Export it again.")
    cfg = read_json(folder / "config.json")["pretrained_cfg"]
    if not all(isinstance(cfg[name], list) and len(cfg[name]) == 3 for name in ("input_size", "mean", "std")):
        raise ValueError(f"config.json of '{folder}' must state input_size, mean, std as three numbers.")
    architecture, model_args = manifest["architecture"], manifest["model_args"]
    model = _fit(load_file(folder / "model.safetensors"), architecture, model_args, folder)
    return Encoder(
        kind="export",
        backbone=manifest["backbone"],
        architecture=architecture,
        model_args=model_args,
        num_features=model.num_features,
        state_dict=model.state_dict(),
        pretrained_cfg=cfg,
        facts={name: manifest[name] for name in FACTS if name in manifest},
    )


def _read_file(path: Path, encoder: str, head: bool) -> Encoder:
    """Read a file of another project, see `dialects.DIALECTS`."""
    found = read_foreign(path, encoder, head=head)
    if head and not found.projection:
        raise no_head(f"'{path}' ({encoder} encoder of {found.dialect.written_by})", "Give another file.")
    tensors, model_args = found.tensors, found.model_args
    for norm in [name for name in tensors if name.endswith("running_mean")]:  # PyTorch 0.4 kept no count
        tensors.setdefault(norm.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    architecture = BACKBONES[found.backbone].architecture
    if architecture == "resnetv2_50":
        tensors = {resnetv2_name(name): t for name, t in tensors.items()}
    model = _fit(tensors, architecture, model_args, path)
    small = architecture == "resnet18_cifar"
    origin = {"file": path.name, **checksums(path), "dialect": found.dialect.name}
    origin |= {"written_by": found.dialect.written_by, "encoders": found.encoders, "head": found.head}
    if isinstance(arch := found.content.get("arch"), str) and re.fullmatch(r"[\w-]{1,64}", arch):
        origin["arch"] = arch
    if small and found.dialect.name != "notebook":
        origin["assumed"] = "32 px and CIFAR-10's mean and std; a 3x3 stem of stride 1, no pooling after it"
    origin["left_out"] = found.left_out
    facts: dict[str, Any] = {"origin": origin}
    epochs = found.content.get("epoch")
    if isinstance(epochs, int) and "pytorch-lightning_version" not in found.content:  # which counts from 0
        facts["epochs"] = epochs
    for zoo_model in ZOO.values():
        if zoo_model.weights_md5 and origin["md5"].startswith(zoo_model.weights_md5):
            facts |= {"recipe_name": zoo_model.name, "data": {"source": zoo_model.data}}
            facts |= {"datasets": ["imagenet-1k"], "license_statement": zoo_model.license}
    return Encoder(
        kind=found.dialect.name,
        backbone=found.backbone,
        architecture=architecture,
        model_args=model_args,
        num_features=model.num_features,
        state_dict=model.state_dict(),
        pretrained_cfg=pretrained_cfg(found.backbone, **(_CIFAR_CFG if small else {})),
        facts=facts,
        head=found.projection,
    )


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Turn whatever is missing or of another type in JSON or safetensors into an error that says where."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"'{path}' is not what mocohub writes: {type(error).__name__}: {error}") from error


def _fit(
    tensors: dict[str, Tensor], architecture: str, model_args: dict[str, Any], source: Path
) -> nn.Module:
    """Return timm's network around exactly these tensors: none missing, none left, none of another shape."""
    # A name such as hf-hub:org/name would make timm fetch; an argument such as checkpoint_path, open a file.
    if not timm.is_model(architecture) or any(re.match("pretrained|checkpoint|cache", a) for a in model_args):
        raise ValueError(f"'{source}' names no network of timm: {architecture!r} with {model_args}.")
    try:
        model = timm.create_model(architecture, num_classes=0, device="meta", **model_args)
        model.load_state_dict(tensors, assign=True)  # strict, without copying anything
    except Exception as error:  # whatever timm's constructors meet in arguments that are none
        lines = str(error).splitlines() or [type(error).__name__]
        more = f"\n\t... and {len(lines) - 5} lines like these" if len(lines) > 5 else ""
        raise ValueError(
            f"The tensors in '{source}' are not those of timm's {architecture} with {model_args}: "
            + "\n".join(line[:1000] for line in lines[:5])
            + more
        ) from None
    return model
