"""A frozen model as a function from batches of images to features, and the facts that identify it."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F


@torch.inference_mode()
def pooled(
    model: nn.Module, pixels: torch.Tensor, *, device: torch.device, dtype: torch.dtype, normalize: bool
) -> torch.Tensor:
    """Return features (n, D) float32 on the CPU, for preprocessed images (n, C, H, W)."""
    weight = next(model.parameters(), pixels)
    pixels = pixels.to(device, weight.dtype, non_blocking=True, memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        if getattr(model, "num_classes", 0) and hasattr(model, "forward_head"):
            features = model.forward_head(model.forward_features(pixels), pre_logits=True)
        else:
            features = model(pixels)
    if not isinstance(features, torch.Tensor) or features.shape[:-1] != pixels.shape[:1]:
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"The model gives {shape} for {len(pixels)} images, but features must be (n, D). "
            "Give a model that pools, such as mocohub.load or timm.create_model(..., num_classes=0) return."
        )
    features = features.float()
    return (F.normalize(features) if normalize else features).cpu()


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the model on the device and in eval mode, and put every module of it back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    home = next(model.parameters(), torch.empty(0)).device
    try:
        model.eval().to(device)
        yield
    finally:
        model.to(home)
        for module, mode in modes:
            module.training = mode


def choose_device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    """Return `device` once it is known to work; by default where the model is, or CUDA if that is the CPU.

    Raises:
        ValueError: If it cannot be used here.
    """
    if device is None:
        home = next(model.parameters(), torch.empty(0)).device
        return torch.device("cuda") if home.type == "cpu" and torch.cuda.is_available() else home
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter is what torch without CUDA raises
        reason = str(error).splitlines()[0]
        raise ValueError(f"device='{device}' cannot be used: {reason}. Omit it, or give 'cpu'.") from error


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What tells two models apart: timm's architecture if it is one of timm's, and SHA-256 of all tensors."""
    digest = hashlib.sha256()
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return {"architecture": architecture, "weights_sha256": digest.hexdigest()}


def data_config(model: nn.Module) -> dict[str, Any]:
    """The preprocessing of a timm model, as JSON values."""
    config = timm.data.resolve_model_data_config(model)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
