import re
import subprocess
import sys
from pathlib import Path

import pytest

from mocohub.backbones import BACKBONES
from mocohub.files import damage, read_json
from mocohub.hub.zoo import ZOO
from mocohub.pretrain.recipes import RECIPES

CARDS = Path(__file__).parents[1] / "model_cards" / "README.md"


def test_the_zoo_has_the_models_of_the_papers_with_their_published_numbers_and_one_of_ours():
    published = {name: (model.backbone, model.linear_top1_pct) for name, model in ZOO.items()}
    assert published == {
        "moco_r50_in1m": ("r50", 60.6),
        "mocov2_r50_in1m": ("r50", 67.7),
        "mocov2_r50_in1m_800ep": ("r50", 71.1),
        "moco_r50w2x_in1m": ("r50w2x", 65.4),
        "moco_r50w4x_in1m": ("r50w4x", 68.6),
        "moco_rx50_in1m": ("rx50", 63.9),
        "moco_r50_ig1b": ("r50", None),
        "moco_tiny_cifar10": ("r18tiny", None),  # ours, not a paper's
    }


@pytest.mark.parametrize("name", ZOO)
def test_every_entry_is_complete(name):
    model = ZOO[name]
    assert model.name == name
    assert model.backbone in BACKBONES
    assert (model.epochs is None) != (model.steps is None)
    assert (model.weights_url is None) == (model.weights_md5 is None)
    assert (model.license is None) == (model.weights_url is None and not model.bundled)
    if model.weights_url:
        assert re.fullmatch(r"https://dl\.fbaipublicfiles\.com/moco/\S+\.pth\.tar", model.weights_url)
        assert re.fullmatch(r"[0-9a-f]{8}", model.weights_md5)


def test_listing_the_zoo_needs_neither_torch_nor_timm_nor_the_hub():
    heavy = "{'torch', 'timm', 'huggingface_hub', 'numpy'}"
    code = f"import sys, mocohub.hub.zoo; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ZOO)
def test_the_table_of_models_says_what_the_zoo_says(name):
    model = ZOO[name]
    row = next(line for line in CARDS.read_text().splitlines() if line.startswith(f"| `{name}` |"))
    length = f"{model.epochs} epochs" if model.epochs else f"{model.steps:,} steps"
    facts = [f"`{model.backbone}`", model.data, length, str(model.linear_top1_pct or "not published")]
    facts += ["comes with mocohub" if model.bundled else model.weights_url or "none", model.weights_md5 or ""]
    assert [fact for fact in facts if fact not in row] == []


BUNDLED = [model for model in ZOO.values() if model.bundled]


@pytest.mark.parametrize("model", BUNDLED, ids=lambda model: model.name)
def test_a_bundled_model_is_a_small_intact_export_with_its_card(model):
    folder = model.bundled_folder
    names = {file.name for file in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "mocohub.json", "README.md"}
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 3_000_000
    for file in ("model.safetensors", "config.json"):
        assert damage(folder, "mocohub.json", file) is None


@pytest.mark.parametrize("model", BUNDLED, ids=lambda model: model.name)
def test_a_bundled_model_was_trained_by_the_recipe_of_its_name_and_measured(model):
    manifest = read_json(model.bundled_folder / "mocohub.json")
    stated = {fact: manifest[fact] for fact in ("name", "backbone", "license", "epochs", "recipe_name")}
    assert stated == {
        "name": model.name,
        "backbone": model.backbone,
        "license": model.license,
        "epochs": model.epochs,
        "recipe_name": model.name,
    }
    assert model.epochs == RECIPES[model.name]().epochs
    card = (model.bundled_folder / "README.md").read_text(encoding="utf-8")
    assert manifest["probes"] and all(probe["protocol"] in card for probe in manifest["probes"])
