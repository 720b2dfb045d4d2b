"""How near the features of two computations are, and what a machine computes fast or exactly."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

Rows = dict[str, torch.Tensor]  # features (n, D), or maps (n, ...), of each column


def least_cosine(found: Rows, reference: Rows) -> float:
    """Return the least cosine of two rows that belong together; -1 if no row of the reference is finite."""
    cosines = [
        F.cosine_similarity(a.cpu().double(), b.cpu().double())[b.cpu().isfinite().all(1)]
        for a, b in _pairs(found, reference)
    ]
    cosines = torch.cat(cosines)
    return -1.0 if len(cosines) == 0 else float(cosines.nan_to_num(-1.0).min())


def largest_error(found: Rows, reference: Rows) -> float:
    """Return the largest length of a difference / length of the reference's row; inf if no row is finite."""
    errors = [
        ((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-30))[b.isfinite().all(1)]
        for a, b in _pairs(found, reference)
    ]
    errors = torch.cat(errors)
    return float("inf") if len(errors) == 0 else float(errors.nan_to_num(float("inf")).max())


def _pairs(found: Rows, reference: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each column twice; a map is compared as one long row."""
    return ((found[name].flatten(1), values.flatten(1)) for name, values in reference.items())


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the processor or card has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Have float32 products on a card computed as such: TF32 keeps three digits."""
    if device.type != "cuda":
        yield
        return
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    former = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, former, strict=True):
            backend.fp32_precision = precision
