"""Find the encoder in whatever holds one: a run, a checkpoint, an exported folder, an official MoCo file.

All of them become one `Encoder`: tensors under timm's names, what builds the network, what prepares its
images, and the facts a model card states. Only safetensors and JSON are read, except for the official
files, which are pickles: they are opened with torch's restricted unpickler, and nothing in them ever runs.
"""

import hashlib
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mocohub.backbones import BACKBONES, backbone, pretrained_cfg
from mocohub.errors import unknown
from mocohub.files import damage, read_json
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

_LAYOUTS = """What is accepted:
  - a training run of mocohub (a folder with run.json)
  - one of its checkpoints (a folder with state.json and state.safetensors)
  - an exported model (a folder with config.json, model.safetensors and mocohub.json)
  - a checkpoint of the official MoCo v1 or v2 code: a file torch.save wrote, whose state_dict has keys
    module.encoder_q.conv1.weight, module.encoder_k.conv1.weight, ... (or the same without 'module.')"""


@dataclass(frozen=True, eq=False)
class Encoder:
    """One encoder without its projection head, and all that is known about it."""

    kind: Literal["run", "checkpoint", "export", "official"]
    backbone: str  # the key of BACKBONES it is, or of which `model_args` make it a variant
    architecture: str  # timm's name
    model_args: dict[str, Any]  # complete: `timm.create_model(architecture, **model_args)`
    num_features: int
    state_dict: dict[str, Tensor]  # timm's names; on the CPU
    pretrained_cfg: dict[str, Any]  # the preprocessing, in timm's terms
    facts: dict[str, Any]  # those of FACTS that are known


def read_encoder(path: str | Path, *, encoder: str = "query") -> Encoder:
    """Read one encoder and check, on the meta device, that its tensors are exactly those of its network.

    Args:
        path: A training run (its newest checkpoint that passes its checksum), a checkpoint folder, an
            exported folder, or a checkpoint file of the official MoCo v1 and v2 code.
        encoder: "query", or "key" for the moving average; an exported folder holds only one.

    Raises:
        FileNotFoundError: If nothing is at `path`.
        ValueError: If it is none of the accepted layouts, or `encoder` is not in it.
        RuntimeError: If a checksum fails and there is no earlier checkpoint to fall back to.
    """
    path = Path(path)
    if encoder not in ENCODERS:
        raise unknown("encoder", encoder, ENCODERS)
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist.")
    if path.is_file():
        return _read_official(path, encoder)
    if (path / "run.json").is_file():
        newest = newest_checkpoint(path)
        if newest is None:
            raise ValueError(f"Run '{path}' has no checkpoint yet: training has to go on for a while.")
        return _read_checkpoint(newest, encoder, "run")
    if (path / "state.json").is_file():
        if reason := damage(path, "state.json", "state.safetensors"):
            raise RuntimeError(f"Checkpoint '{path}' is damaged: {reason}. Use an earlier one of its run.")
        return _read_checkpoint(path, encoder, "checkpoint")
    if (path / "mocohub.json").is_file():
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


def _read_checkpoint(folder: Path, encoder: str, kind: Literal["run", "checkpoint"]) -> Encoder:
    state = read_json(folder / "state.json")
    if state.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(
            f"'{folder}' is of format {state.get('format')!r}: this reads {CHECKPOINT_FORMAT!r}."
        )
    prefix = f"{encoder}.backbone."
    with safe_open(folder / "state.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
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
    )


def _read_export(folder: Path, encoder: str) -> Encoder:
    manifest = check_export(folder, encoder)
    if manifest.get("format") != EXPORT_FORMAT:
        raise ValueError(f"'{folder}' is of format {manifest.get('format')!r}: this reads {EXPORT_FORMAT!r}.")
    architecture, model_args = manifest["architecture"], manifest["model_args"]
    model = _fit(load_file(folder / "model.safetensors"), architecture, model_args, folder)
    return Encoder(
        kind="export",
        backbone=manifest["backbone"],
        architecture=architecture,
        model_args=model_args,
        num_features=model.num_features,
        state_dict=model.state_dict(),
        pretrained_cfg=read_json(folder / "config.json")["pretrained_cfg"],
        facts={name: manifest[name] for name in FACTS if name in manifest},
    )


def _read_official(path: Path, encoder: str) -> Encoder:
    """Read {"epoch", "arch", "state_dict", "optimizer"}, as facebookresearch/moco's main_moco.py saves it."""
    checkpoint = _open_pickle(path)
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict):
        raise _not_moco(path, checkpoint)
    tensors = {k: v for k, v in state_dict.items() if isinstance(k, str) and isinstance(v, Tensor)}
    # Users have files with and without the prefix of DistributedDataParallel.
    prefixes = (f"module.encoder_{encoder[0]}.", f"encoder_{encoder[0]}.")
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        raise _not_moco(path, state_dict)
    tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    head = "mlp" if "fc.2.weight" in tensors else "linear"
    tensors = {name: t for name, t in tensors.items() if not name.startswith("fc.")}
    try:
        name, model_args = detect({name: tuple(t.shape) for name, t in tensors.items()})
    except (LookupError, ValueError, ZeroDivisionError):
        raise _not_moco(path, state_dict) from None
    architecture = BACKBONES[name].architecture
    if architecture == "resnetv2_50":
        tensors = {resnetv2_name(name): t for name, t in tensors.items()}
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    origin = {"file": path.name, "md5": md5, "arch": checkpoint.get("arch"), "head": head}
    facts = {"origin": origin, "epochs": checkpoint.get("epoch")}
    for model in ZOO.values():
        if model.weights_md5 and md5.startswith(model.weights_md5):
            facts |= {"recipe_name": model.name, "data": {"source": model.data}}
            facts |= {"datasets": ["imagenet-1k"], "license_statement": model.license}
    model = _fit(tensors, architecture, model_args, path)
    return Encoder(
        kind="official",
        backbone=name,
        architecture=architecture,
        model_args=model_args,
        num_features=model.num_features,
        state_dict=model.state_dict(),
        pretrained_cfg=pretrained_cfg(name),
        facts=facts,
    )


def _open_pickle(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise ValueError(f"'{path}' is empty.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch lets out whatever its parsers meet in a file that is none of its own
        # `from None`, since torch's text advises weights_only=False, which would run the code.
        found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            raise ValueError(
                f"'{path}' is refused: it is a pickle that names {found[1].rstrip('.')}, so to open it could "
                "run code. Nothing was run. Ask its author for the tensors alone, as safetensors."
            ) from None
        raise ValueError(
            f"'{path}' is not a file torch.save wrote, or it is damaged ({type(error).__name__}).\n{_LAYOUTS}"
        ) from None


def _not_moco(path: Path, found: Any) -> ValueError:
    seen = [str(key) for key in found][:5] if isinstance(found, Mapping) else type(found).__name__
    return ValueError(f"'{path}' is no MoCo checkpoint. Its first keys: {seen}.\n{_LAYOUTS}")


def detect(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """Tell a ResNet from the shapes of its tensors.

    Args:
        shapes: Of all tensors but the classifier's, by torchvision's names.

    Returns:
        The key of BACKBONES that it is or of which it is a variant, and timm's complete arguments.

    Raises:
        LookupError, ValueError, ZeroDivisionError: If the shapes are not those of a ResNet.
    """
    stages = ("layer1", "layer2", "layer3", "layer4")
    layers = [len({name.split(".")[1] for name in shapes if name.startswith(f"{s}.")}) for s in stages]
    stem_chs = shapes["conv1.weight"][0]
    if "layer1.0.conv3.weight" not in shapes:  # two convolutions in a block
        planes = [shapes[f"{stage}.0.conv2.weight"][0] for stage in stages]
        args: dict[str, Any] = {}
        name, usual = "r18", {"layers": [2, 2, 2, 2]}  # `usual`: what timm assumes unless told otherwise
    else:
        planes = [shapes[f"{stage}.0.conv3.weight"][0] // 4 for stage in stages]
        width, group_width = shapes["layer1.0.conv2.weight"][:2]
        cardinality, base_width = width // group_width, 64 * group_width // planes[0]
        usual = {"layers": [3, 4, 6, 3]}
        if cardinality > 1:
            name, usual = "rx50", usual | {"cardinality": 32, "base_width": 4}
            args = {"cardinality": cardinality, "base_width": base_width}
        elif stem_chs == 64:
            name, usual, args = "r50", usual | {"base_width": 64}, {"base_width": base_width}
        else:  # another stem than 64 wide, which only ResNetV2 can have
            name, args = "r50w2x", {"preact": False}
            factor = stem_chs // 64
            if [stem_chs, *planes] == [64 * factor, 64 * factor, 128 * factor, 256 * factor, 512 * factor]:
                planes, args["width_factor"] = [p // factor for p in planes], factor
            else:
                planes, args["stem_chs"] = [4 * p for p in planes], stem_chs  # timm counts the block's output
    args |= {"layers": layers, "channels": planes}
    usual["channels"] = [64, 128, 256, 512]
    args = {key: value for key, value in args.items() if usual.get(key) != value}
    architecture = BACKBONES[name].architecture
    for known, spec in BACKBONES.items():
        if (spec.architecture, dict(spec.model_args)) == (architecture, args):
            return known, args
    return name, args


def _fit(
    tensors: dict[str, Tensor], architecture: str, model_args: dict[str, Any], source: Path
) -> nn.Module:
    """Return timm's network around exactly these tensors: none missing, none left, none of another shape."""
    model = timm.create_model(architecture, num_classes=0, device="meta", **model_args)
    try:
        model.load_state_dict(tensors, assign=True)  # strict, without copying anything
    except RuntimeError as error:
        raise ValueError(
            f"The tensors in '{source}' are not those of timm's {architecture} with {model_args}: {error}"
        ) from None
    return model


def resnetv2_name(name: str) -> str:
    """Name of a torchvision ResNet's tensor in timm's post-activation ResNetV2, which can widen its stem.

    >>> resnetv2_name("layer2.0.downsample.1.weight"), resnetv2_name("bn1.running_mean")
    ('stages.1.blocks.0.downsample.norm.weight', 'stem.norm.running_mean')
    """
    name = re.sub(r"^conv1\.", "stem.conv.", name)
    name = re.sub(r"^bn1\.", "stem.norm.", name)
    name = re.sub(r"^layer(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.", name)
    name = re.sub(r"\.bn(\d)\.", r".norm\1.", name)
    return name.replace(".downsample.0.", ".downsample.conv.").replace(".downsample.1.", ".downsample.norm.")


def torchvision_name(name: str) -> str:
    """The inverse of `resnetv2_name`.

    >>> torchvision_name("stages.1.blocks.0.norm2.bias")
    'layer2.0.bn2.bias'
    """
    name = name.replace(".downsample.conv.", ".downsample.0.").replace(".downsample.norm.", ".downsample.1.")
    name = re.sub(r"\.norm(\d)\.", r".bn\1.", name)
    name = re.sub(r"^stages\.(\d)\.blocks\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.", name)
    return re.sub(r"^stem\.conv\.", "conv1.", re.sub(r"^stem\.norm\.", "bn1.", name))
