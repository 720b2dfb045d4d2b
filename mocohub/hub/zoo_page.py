"""A page of all models in one static file: numbers, licences, where weights are, commands to copy."""

import importlib.resources
from pathlib import Path
from typing import Any

import jinja2

import mocohub
from mocohub.files import read_json, replace_file
from mocohub.hub.zoo import ZOO, ZooModel

_WEIGHTS = {"bundled": "in the package", "authors": "by the authors", "none": "not published"}
_VOC = "VOC detection, C4, 07+12"  # the transfer result that most of the models have


def write_zoo_page(html: str | Path) -> Path:
    """Write the page of all models and return its path. It needs no other file, no server and no network.

    Args:
        html: The file to write (its name ends in .html or .htm), or the folder for its index.html. What an
            earlier call wrote there is replaced.
    """
    path = Path(html)
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        path = path / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    template = importlib.resources.files("mocohub.hub").joinpath("zoo_page_template.html").read_text("utf-8")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(template).render(
        models=[_entry(model) for model in ZOO.values()],
        backbones=list(dict.fromkeys(model.backbone for model in ZOO.values())),
        weights=_WEIGHTS,
        version=mocohub.__version__,
    )
    replace_file(path, page)
    return path


def _entry(model: ZooModel) -> dict[str, Any]:
    """What the page shows of one model, beside the model itself."""
    voc = next((row.value for row in model.transfers if row.task == _VOC), None)
    probes = read_json(model.bundled_folder / "mocohub.json")["probes"] if model.bundled else []
    return {
        "zoo": model,
        "millions": f"{model.num_parameters / 1e6:.1f}",
        "ap50": voc.split(" / ")[0] if voc else None,
        "weights": _WEIGHTS[model.weights],
        "license": {"bundled": model.license, "authors": "not stated", "none": "none yet"}[model.weights],
        "commands": _commands(model),
        "probes": probes,
    }


def _commands(model: ZooModel) -> dict[str, str]:
    """Label of a button -> what it copies: what works today."""
    if model.weights == "none":
        return {"train": f"mocohub pretrain {model.name} --data IMAGES --out RUN"}
    commands = {"load": f'mocohub.load("{model.name}")'}
    if model.weights_url:
        commands["download"] = f"curl --remote-name {model.weights_url}"
    return commands
