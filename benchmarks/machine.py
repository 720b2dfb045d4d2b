"""What a benchmark was measured on, for the first line that it prints."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "timm", "torchvision", "pillow")


def machine(device: str = "cpu") -> str:
    """Return processor or card, threads, and the versions of what matters."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, Python {platform.python_version()}, {packages}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ")[1] for line in lines if "model name" in line), platform.processor())
    able = torch.cpu.get_capabilities()
    units = [name for name in ("amx_bf16", "avx512_bf16") if able.get(name, False)]
    return (
        f"{model} {' '.join(units)}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, {packages}"
    )
