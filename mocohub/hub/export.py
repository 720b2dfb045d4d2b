"""Turn a trained encoder into a folder that timm, transformers and the Hub read as it stands."""

import json
import math
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import save_file
from torch import nn

import mocohub
from mocohub.errors import unknown
from mocohub.files import atomic_folder, refuse_existing, sha256, write_json
from mocohub.hub import cards, records
from mocohub.hub.encoders import EXPORT_FORMAT, Encoder, read_encoder
from mocohub.hub.load import load, local_copy


def export(
    source: str | Path,
    out: str | Path,
    *,
    license: str,
    name: str | None = None,
    probes: Iterable[Mapping[str, Any]] = (),
    encoder: str = "query",
) -> Path:
    """Write one encoder as a model folder: model.safetensors, config.json, mocohub.json and README.md.

    The folder loads with `timm.create_model("local-dir:OUT", pretrained=True)` and, once published, with
    "hf-hub:org/name", in both cases without mocohub (only the small-image networks need `import mocohub`).
    It appears complete or not at all.

    Args:
        source: Whatever `read_encoder` reads (a run, a checkpoint, an exported folder, a file of others), a
            name of the zoo, or `hf-hub:org/name`.
        out: The folder to write; nothing may be there yet.
        license: The weights' licence, by the Hub's identifier; "other" if it has none there.
        name: The model's name; the name of `out` if None.
        probes: Measured numbers for the card, see `records.check_probes`.
        encoder: "query" (the one the papers evaluate) or "key".

    Returns:
        `out`.

    Raises:
        ValueError: If the licence is missing or unknown, a probe states no protocol, the name cannot be a
            repository's, or `source` holds no such encoder.
        FileExistsError: If `out` is there already.
        FileNotFoundError, RuntimeError: As `read_encoder`.
    """
    out = Path(out)
    if not license:
        raise ValueError(
            "license is missing. Nobody may use weights that come without one, and only you know what your "
            "images allow. Give the Hub's identifier, for instance 'apache-2.0', 'cc-by-nc-4.0' or 'other'."
        )
    if license not in cards.HUB_LICENSES:
        raise unknown("license", license, cards.HUB_LICENSES)
    name = out.resolve().name if name is None else name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(
            f"'{name}' cannot name a model on the Hub. Give a name of letters, digits, '-', '_' and '.', "
            "for instance name='moco_r50'."
        ) from error
    probes = records.check_probes(probes)
    refuse_existing(out)
    found = read_encoder(local_copy(source, encoder), encoder=encoder)
    with atomic_folder(out) as folder:
        provenance = {"name": name, "encoder": encoder, "license": license, "mocohub": mocohub.__version__}
        tensors = {key: tensor.contiguous() for key, tensor in found.state_dict.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **provenance})
        _sort_metadata(folder / "model.safetensors")
        write_json(folder / "config.json", _config(found, name, license))
        model = load(folder)  # from the disk, so the numbers below are those of the files
        manifest = {
            "format": EXPORT_FORMAT,
            "name": name,
            "backbone": found.backbone,
            "architecture": found.architecture,
            "model_args": found.model_args,
            "stock_timm": not timm.models.model_entrypoint(found.architecture).__module__.startswith(
                "mocohub."
            ),
            "num_features": found.num_features,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "encoder": encoder,
            "source": found.kind,
            **found.facts,
            "preprocessing": {
                key: found.pretrained_cfg[key]
                for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
            },
            "exported_with": {
                "mocohub": mocohub.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "safetensors": safetensors.__version__,
                "python": platform.python_version(),
            },
            "license": license,
            "probes": probes,
            "fingerprint": fingerprint(model),
            "sha256": {file: sha256(folder / file) for file in ("model.safetensors", "config.json")},
        }
        write_json(folder / "mocohub.json", manifest)
        (folder / "README.md").write_text(cards.render(manifest), encoding="utf-8")
    return out


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return a few numbers that tell whether a copy of a model computes what the original did.

    Args:
        model: A backbone from `load`, on any device.

    Returns:
        The input's size and, for one fixed pattern of pixels, the first eight features and the L2 norm of
        all. Two machines agree to about 1e-5 relative, not to the bit.
    """
    cfg = model.pretrained_cfg
    channels, height, width = cfg["input_size"]
    like = next(model.parameters())
    pixels = torch.arange(channels * height * width).reshape(1, channels, height, width) * 7919 % 256 / 255
    mean, std = (torch.tensor(cfg[key]).reshape(1, channels, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        features = model(((pixels - mean) / std).to(like))[0].double().cpu()  # (D,)
    return {
        "input_size": [channels, height, width],
        "features": features[:8].tolist(),
        "norm": features.norm().item(),
    }


def fingerprint_difference(stated: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Return how far two fingerprints are apart, relative to the length of the first; inf if of other inputs.

    Raises:
        ValueError: If one of them is no fingerprint.
    """
    try:
        first, second = (
            torch.tensor(
                [float(value) for value in (*prints["features"], prints["norm"])], dtype=torch.double
            )
            for prints in (stated, found)
        )
        if len(first) < 2 or len(first) != len(second) or stated["input_size"] != found["input_size"]:
            return math.inf
    except (KeyError, TypeError) as error:
        raise ValueError(f"This is no fingerprint: {stated} ({error!r}).") from error
    norm = (second - first)[-1].abs() / first[-1]
    # The first eight features may happen to be next to nothing.
    features = (second - first)[:-1].norm() / first[:-1].norm().clamp(min=1e-3 * first[-1].item())
    return torch.maximum(features, norm).nan_to_num(math.inf).item()


def _sort_metadata(file: Path) -> None:
    """Undo the random order in which safetensors writes metadata: equal content shall be equal bytes."""
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
        assert len(text) == size
        stream.seek(8)
        stream.write(text)


def _config(found: Encoder, name: str, license: str) -> dict[str, Any]:
    """The folder's config.json, for timm and for the TimmWrapper of transformers.

    Not by timm's own `save_for_hf`: it fills in the crop, the interpolation and the licence of other weights,
    and `num_classes` in its `model_args` makes transformers fail.
    """
    return {
        "architecture": found.architecture,
        "num_classes": 0,
        "num_features": found.num_features,
        "global_pool": "avg",
        "model_args": found.model_args,
        "pretrained_cfg": {
            **found.pretrained_cfg,
            "tag": name,
            "license": license,
            "paper_name": "Momentum Contrast for Unsupervised Visual Representation Learning",
            "paper_ids": "arXiv:1911.05722",
        },
    }
