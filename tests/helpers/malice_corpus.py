"""All malicious inputs, from the modules that add theirs when they are imported."""

import shutil
from pathlib import Path

import torch

from helpers import malice_images, malice_models, malice_pickles
from helpers.malice import ATTACKS, Site, png, run_exec

assert len({attack.name for attack in ATTACKS}) == len(ATTACKS), (
    malice_images,
    malice_models,
    malice_pickles,
)


def write(site: Site) -> dict[str, Path]:
    """Write the corpus; returns the path of each attack."""
    site.canaries.mkdir()
    shutil.copytree(site.model, site.outside)  # a model that would load, if one could be lured there
    (site.outside / "secret.png").write_bytes(png())
    (site.outside / "secret.txt").write_text("a key that must not become public\n")
    torch.save(run_exec(site, Path("evil.pth", "_")), site.outside / "evil.pth")
    (site.root / "evil.py").write_text(f"open({str(site.canaries / 'import evil')!r}, 'w').close()\n")
    paths = {}
    for entry in ATTACKS:
        path = site.root / "corpus" / entry.name.replace(" ", "_") / entry.path
        path.parent.mkdir(parents=True)
        entry.write(site, path)
        paths[entry.name] = path
    return paths
