"""A model of somebody: its numbers, device and mode, its preprocessing, and what tells it from others."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import timm
import torch
from torch import nn


def weight_dtype(model: nn.Module) -> torch.dtype:
    """Type of the first parameter that is no integer, which images get."""
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Have the model on the device and in eval mode, and put every module of it back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    home = next(model.parameters(), torch.empty(0)).device
    try:
        yield model.eval().to(device)
    finally:
        model.to(home)
        for module, mode in modes:
            module.train(mode)  # some merge weights or fill caches in eval mode, and undo it here
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
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")  # torch goes on for pages
        raise ValueError(f"device='{device}' cannot be used: {reason}. Omit it, or give 'cpu'.") from error


def model_facts(model: nn.Module) -> dict[str, Any]:
    """What tells two models apart: timm's architecture if it is one of timm's, and SHA-256 of all tensors.

    Raises:
        ValueError: If a tensor has no values, being on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors("", model.state_dict()), key=itemgetter(0)):
        if tensor.is_meta:
            raise ValueError(
                f"'{name}' of the model is on the meta device, without values. Load its weights."
            )
        tensor = tensor.dequantize() if tensor.is_quantized else tensor
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    return {"architecture": architecture, "weights_sha256": digest.hexdigest()}


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a state dict with their names; quantised layers have some in tuples."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict | tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(f"{name}.{key}" if name else key, one)


def data_config(model: nn.Module) -> dict[str, Any]:
    """The preprocessing of a timm model, as JSON values."""
    config = timm.data.resolve_model_data_config(model)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
