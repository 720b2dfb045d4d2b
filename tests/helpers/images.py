"""Small images made on the spot."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(folder: Path, counts: dict[str, int], size_px: int = 12, seed: int = 0) -> Path:
    """Write FOLDER/<class>/0000.png ...: each class has its own colours, each image its own noise."""
    random = np.random.RandomState(seed)
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        base = np.random.RandomState(100 + number).randint(0, 200, (size_px, size_px, 3))
        for i in range(count):
            pixels = (base + random.randint(0, 56, base.shape)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:04d}.png")
    return folder
