"""An encoder as one file for other programs: torchvision, detectron2, ONNX.

None of them needs mocohub to read its file; what they need besides is printed. Folders for timm and
transformers are written by `export.py`.
"""

import importlib.util
import os
import pickle
import re
import secrets
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

import mocohub
from mocohub.errors import missing_extra, unknown
from mocohub.files import refuse_existing
from mocohub.hub.encoders import Encoder, read_encoder
from mocohub.hub.load import local_copy

TARGETS = ("torchvision", "detectron2", "onnx")
_DETECTRON2_DEPTHS = {
    ("BasicBlock", (2, 2, 2, 2)): 18,
    ("BasicBlock", (3, 4, 6, 3)): 34,
    ("Bottleneck", (3, 4, 6, 3)): 50,
    ("Bottleneck", (3, 4, 23, 3)): 101,
    ("Bottleneck", (3, 8, 36, 3)): 152,
}
_ONNX_OPSET = 18
_ONNX_TOLERANCE = 1e-4  # relative to the largest feature


@dataclass(frozen=True)
class Converted(os.PathLike[str]):
    """A file that was written, a path by itself, and how the program it is for reads it."""

    path: Path
    usage: str

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return f"{self.path}\n\n{self.usage}"


def convert(source: str | Path, out: str | Path, *, to: str, encoder: str = "query") -> Converted:
    """Write an encoder for another program. The file appears complete or not at all.

    Args:
        source: Whatever `read_encoder` reads (a run, a checkpoint, an exported folder, a file of others), a
            name of the zoo, or `hf-hub:org/name`.
        out: The file to write; nothing may be there yet.
        to: "torchvision": safetensors under torchvision's names, wide networks too. "detectron2": the pickle
            of arrays that facebookresearch/moco's converter writes, for MODEL.WEIGHTS. "onnx": a graph from
            `images` (N, 3, H, W) to `features` (N, num_features) for any N, compared with torch in
            onnxruntime, if that is installed, before it is kept.
        encoder: "query", which the papers evaluate, or "key".

    Returns:
        The path, with the lines of code or configuration that read the file.

    Raises:
        ValueError: If `to` is none of these, `source` holds no such encoder, or detectron2 no such network.
        FileExistsError: If `out` is there already.
        FileNotFoundError: If `source` does not exist.
        ImportError: If the extra `onnx` is not installed.
        RuntimeError: If the graph gives other features in onnxruntime.
    """
    if to not in TARGETS:
        raise unknown("target", to, TARGETS)
    out = refuse_existing(out)
    if out.is_dir():
        raise FileExistsError(f"'{out}' is a folder. Give the name of the file to write.")
    if to == "onnx" and not (importlib.util.find_spec("onnx") and importlib.util.find_spec("onnxscript")):
        raise missing_extra("onnx and onnxscript", "onnx", "Converting to ONNX")
    found = read_encoder(local_copy(source, encoder), encoder=encoder)
    write, usage = {
        "torchvision": (_write_torchvision, _torchvision_usage),
        "detectron2": (_write_detectron2, _detectron2_usage),
        "onnx": (_write_onnx, _onnx_usage),
    }[to]
    text = usage(found, out)  # first, as it may refuse
    with _atomic_file(out) as partial:
        write(found, partial)
    return Converted(out, text)


@contextmanager
def _atomic_file(out: Path) -> Iterator[Path]:
    """Give the path of a hidden file that becomes `out` when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    partial.touch(exist_ok=False)
    mode = partial.stat().st_mode & 0o777  # what the umask left; safetensors makes it 0600
    try:
        yield partial
        partial.chmod(mode)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)


def _shape(found: Encoder) -> dict[str, Any]:
    """The few numbers that tell two ResNets apart, read off the tensors."""
    tensors = found.torchvision_state_dict()
    stages = [f"layer{n}" for n in range(1, 5)]
    bottleneck = "layer1.0.conv3.weight" in tensors
    last = "conv3" if bottleneck else "conv2"
    width, group_width = tensors["layer1.0.conv2.weight"].shape[:2]
    return {
        "block": "Bottleneck" if bottleneck else "BasicBlock",
        "layers": [len({k.split(".")[1] for k in tensors if k.startswith(f"{s}.")}) for s in stages],
        "stem_chs": tensors["conv1.weight"].shape[0],
        "stem_px": tensors["conv1.weight"].shape[-1],
        "out_chs": [tensors[f"{stage}.0.{last}.weight"].shape[0] for stage in stages],
        "groups": width // group_width,
        "group_width": group_width,
    }


def _write_torchvision(found: Encoder, out: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in found.torchvision_state_dict().items()}
    save_file(tensors, out, metadata={"format": "pt"})


def _torchvision_usage(found: Encoder, out: Path) -> str:
    shape = _shape(found)
    planes = [chs // 4 if shape["block"] == "Bottleneck" else chs for chs in shape["out_chs"]]
    # torchvision's own `width_per_group` is the inner width at 64 planes.
    width_per_group = 64 * shape["group_width"] // planes[0]
    small = shape["stem_px"] == 3
    stem = "3, stride=1, padding=1" if small else "7, stride=2, padding=3"
    grouped = (shape["groups"], width_per_group) != (1, 64)
    groups = f", groups={shape['groups']}, width_per_group={width_per_group}" if grouped else ""
    lines = [
        "from safetensors.torch import load_file",
        "from torch import nn",
        f"from torchvision.models.resnet import {shape['block']}, ResNet",
        "",
        f"model = ResNet({shape['block']}, {shape['layers']}{groups})",
    ]
    if small or [shape["stem_chs"], *planes] != [64, 64, 128, 256, 512]:
        lines += [
            f"model.inplanes = {shape['stem_chs']}  # torchvision has no argument for these widths",
            f"model.conv1 = nn.Conv2d(3, model.inplanes, {stem}, bias=False)",
            "model.bn1 = nn.BatchNorm2d(model.inplanes)",
            f"for n, planes in enumerate({planes}):",
            f"    blocks = model._make_layer({shape['block']}, planes, {shape['layers']}[n], "
            "stride=2 if n else 1)",
            '    setattr(model, f"layer{n + 1}", blocks)',
        ]
    lines += ["model.maxpool = nn.Identity()"] if small else []
    lines += ["model.fc = nn.Identity()", f"model.load_state_dict(load_file({str(out)!r}))", "model.eval()"]
    return "\n".join(lines)


def detectron2_name(name: str) -> str:
    """Name of a torchvision ResNet's tensor in detectron2, as facebookresearch/moco's converter maps it.

    >>> detectron2_name("layer1.0.downsample.1.weight"), detectron2_name("bn1.running_var")
    ('res2.0.shortcut.norm.weight', 'stem.conv1.norm.running_var')
    """
    if not name.startswith("layer"):
        name = f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    return name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


def _write_detectron2(found: Encoder, out: Path) -> None:
    tensors = found.torchvision_state_dict().items()
    model = {detectron2_name(name): tensor.numpy() for name, tensor in tensors}
    data = pickle.dumps({"model": model, "__author__": "mocohub", "matching_heuristics": True}, protocol=3)
    # detectron2 is often used with NumPy 1, which does not know its function by NumPy 2's name for it. In
    # this protocol the name stands in the file as text, once, before all data.
    new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    assert data.count(new, 0, 4096) + data.count(old, 0, 4096) == 1
    out.write_bytes(data.replace(new, old, 1))


def _detectron2_usage(found: Encoder, out: Path) -> str:
    shape = _shape(found)
    depth = _DETECTRON2_DEPTHS.get((shape["block"], tuple(shape["layers"])))
    doubling = [shape["out_chs"][0] << n for n in range(4)] == shape["out_chs"]
    if depth is None or not doubling or shape["stem_px"] != 7:
        raise ValueError(
            f"detectron2 has no such ResNet: {shape['layers']} times {shape['block']}, {shape['out_chs']} "
            f"channels, {shape['stem_px']}x{shape['stem_px']} stem. It has depths 18, 34, 50, 101 and 152, "
            "channels that double from stage to stage, and a 7x7 stem."
        )
    cfg = found.pretrained_cfg
    mean, std = ([round(255 * value, 3) for value in cfg[key]] for key in ("mean", "std"))
    return textwrap.dedent(f"""\
        MODEL:
          WEIGHTS: {out}
          PIXEL_MEAN: {mean}
          PIXEL_STD: {std}
          RESNETS:
            DEPTH: {depth}
            STEM_OUT_CHANNELS: {shape["stem_chs"]}
            RES2_OUT_CHANNELS: {shape["out_chs"][0]}
            NUM_GROUPS: {shape["groups"]}
            WIDTH_PER_GROUP: {shape["group_width"]}
            STRIDE_IN_1X1: False
        INPUT:
          FORMAT: RGB""")


def _model(found: Encoder) -> torch.nn.Module:
    model = timm.create_model(found.architecture, num_classes=0, device="meta", **found.model_args)
    model.load_state_dict(found.state_dict, assign=True)
    return model.eval()


def _write_onnx(found: Encoder, out: Path) -> None:
    model = _model(found)
    _, height, width = found.pretrained_cfg["input_size"]
    # Any batch size: exporting with one image would make a constant of it.
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 4 - 2
    program = torch.onnx.export(
        model,
        (images,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        opset_version=_ONNX_OPSET,
        dynamo=True,
        verbose=False,
    )
    cfg = found.pretrained_cfg
    facts = {key: cfg[key] for key in ("input_size", "interpolation", "crop_pct", "mean", "std")}
    program.model.metadata_props.update({key: str(value) for key, value in facts.items()})
    program.model.producer_name, program.model.producer_version = "mocohub", mocohub.__version__
    program.save(out, external_data=False)  # one file
    if importlib.util.find_spec("onnxruntime"):
        _compare_onnx(out, model, torch.cat([images, images.flip(3)[:1]]))


def _compare_onnx(file: Path, model: torch.nn.Module, images: torch.Tensor) -> None:
    """Refuse a graph that does not compute in onnxruntime what the model computes here."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (features,) = session.run(["features"], {"images": images.numpy()})
    with torch.inference_mode():
        expected = model(images)
    error = ((torch.from_numpy(features) - expected).abs().max() / expected.abs().max()).item()
    if not error <= _ONNX_TOLERANCE:  # or not a number
        raise RuntimeError(
            f"In onnxruntime {onnxruntime.__version__} the graph's features differ by {error:.1e} of the "
            f"largest, more than {_ONNX_TOLERANCE:.0e}. Nothing was written."
        )


def _onnx_usage(found: Encoder, out: Path) -> str:
    cfg = found.pretrained_cfg
    checked = (
        "" if importlib.util.find_spec("onnxruntime") else "# onnxruntime is missing: it was not compared.\n"
    )
    return checked + textwrap.dedent(f"""\
        import onnxruntime

        session = onnxruntime.InferenceSession({str(out)!r})
        # images: float32 (N, {", ".join(map(str, cfg["input_size"]))}), RGB in 0..1,
        #     less {cfg["mean"]}, divided by {cfg["std"]}; features: (N, {found.num_features})
        (features,) = session.run(["features"], {{"images": images}})""")
