import re
import subprocess
import sys
from pathlib import Path

import pytest

from mocohub.backbones import BACKBONES, create_backbone
from mocohub.cli import main
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
    assert (model.license is None) == (model.weights == "none")
    if model.weights_url:
        assert re.fullmatch(r"https://dl\.fbaipublicfiles\.com/moco/\S+\.pth\.tar", model.weights_url)
        assert re.fullmatch(r"[0-9a-f]{8}", model.weights_md5)
        assert "LICENSE file of their repository is MIT, its README says CC-BY-NC 4.0" in model.license


@pytest.mark.parametrize("name", ZOO)
def test_the_sizes_are_those_of_the_network(name):
    network = create_backbone(ZOO[name].backbone, device="meta")
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert (ZOO[name].num_parameters, ZOO[name].num_features) == (parameters, network.num_features)


@pytest.mark.parametrize("name", [name for name, model in ZOO.items() if not model.bundled])
def test_the_cost_is_the_one_that_the_recipe_states(name):
    stated = re.split(", | \\(", ZOO[name].cost)[0]
    assert stated in " ".join(RECIPES[name].__doc__.split())


def test_the_transfer_results_are_those_of_the_papers_tables():
    def values(name, *tasks):
        rows = {row.task: row.value.split(" / ") for row in ZOO[name].transfers}
        return [[float(value) for value in rows[task]] for task in tasks]

    voc = ("VOC detection, C4, 07+12", "VOC detection, dilated C5, 07+12", "VOC detection, C4, 07")
    coco = [f"COCO Mask R-CNN, {head}, {length}" for head in ("FPN", "C4") for length in ("1x", "2x")]
    other = ["COCO keypoints", "COCO DensePose", "LVIS v0.5 masks", "Cityscapes instances"]
    other += ["Cityscapes semantic segmentation", "VOC semantic segmentation"]
    other += ["iNaturalist 2018, fine-tuned", "ImageNet-1k, fine-tuned"]
    v1, instagram = "moco_r50_in1m", "moco_r50_ig1b"
    assert values(v1, *voc) == [[81.5, 55.9, 62.6], [81.1, 54.6, 59.9], [74.9, 46.6, 50.1]]
    assert values(instagram, *voc) == [[82.2, 57.2, 63.7], [81.6, 55.5, 61.2], [75.6, 47.6, 51.7]]
    assert values(v1, *coco) == [[38.5, 35.1], [40.8, 36.9], [38.5, 33.6], [40.7, 35.4]]
    assert values(instagram, *coco) == [[38.9, 35.4], [41.1, 37.4], [39.1, 34.1], [41.1, 35.6]]
    assert sum(values(v1, *other), []) == [66.8, 50.1, 24.1, 32.3, 75.3, 72.5, 65.6, 77.0]
    assert sum(values(instagram, *other), []) == [66.9, 50.6, 24.9, 32.9, 75.5, 73.6, 65.8, 77.3]
    assert values("mocov2_r50_in1m", voc[0]) == [[82.4, 57.0, 63.6]]
    assert values("mocov2_r50_in1m_800ep", voc[0]) == [[82.5, 57.4, 64.0]]
    assert all(row.source.startswith("arXiv ") for model in ZOO.values() for row in model.transfers)


def test_the_namespace_of_the_hub_can_be_another(monkeypatch):
    monkeypatch.delenv("MOCOHUB_NAMESPACE", raising=False)
    assert ZOO["moco_r50_in1m"].repository == "mocohub/moco_r50_in1m"
    monkeypatch.setenv("MOCOHUB_NAMESPACE", "our-lab")
    assert ZOO["moco_r50_in1m"].repository == "our-lab/moco_r50_in1m"


def test_list_and_info_say_where_the_weights_are_and_what_training_costs(capsys):
    assert main(["list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["moco_r50_in1m"].endswith("published by the authors") and "60.6 %" in lines["moco_r50_in1m"]
    assert lines["moco_r50w4x_in1m"].endswith("none published") and "375.4 M" in lines["moco_r50w4x_in1m"]
    assert lines["moco_tiny_cifar10"].endswith("come with mocohub")
    assert main(["info", "mocov2_r50_in1m"]) == 0
    text = capsys.readouterr().out
    assert "VOC detection, C4, 07+12: AP50 / AP / AP75 82.4 / 57.0 / 63.6 (arXiv 2003.04297" in text
    assert "moco_v2_200ep_pretrain.pth.tar (MD5 59fd9945...)" in text and "README says CC-BY-NC 4.0" in text
    assert main(["info", "moco_r50w2x_in1m"]) == 0
    text = capsys.readouterr().out
    assert "nobody has published any" in text and "about 4 times that of R50" in text


def test_listing_the_zoo_needs_neither_torch_nor_timm_nor_the_hub():
    heavy = "{'torch', 'timm', 'huggingface_hub', 'numpy'}"
    code = f"import sys, mocohub.hub.zoo; print(sorted({heavy} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ZOO)
def test_the_table_of_models_says_what_the_zoo_says(name):
    model = ZOO[name]
    row = next(
        line for line in CARDS.read_text().splitlines() if line.startswith(f"| [`{name}`]({name}.md) |")
    )
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
