import pytest
import yaml
from huggingface_hub import ModelCard

from mocohub.hub import cards


def facts(**changes):
    return {
        "name": "moco_flowers",
        "backbone": "r50",
        "architecture": "resnet50",
        "model_args": {},
        "stock_timm": True,
        "num_features": 2048,
        "num_parameters": 23508032,
        "encoder": "query",
        "recipe_name": "moco_r50_in1m",
        "recipe": {"epochs": 200, "temperature": 0.07, "augmentation": {"crop_scale_min": 0.2}},
        "data": {"source": "flowers", "num_images": 128116, "paths_sha256": "0" * 64},
        "steps": 1000,
        "epochs": 2.0,
        "num_images_seen": 256000,
        "versions": {"torch": "2.15.0"},
        "commit": "c0ffee",
        "preprocessing": {
            "input_size": [3, 224, 224],
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "exported_with": {"mocohub": "0.1"},
        "license": "cc-by-4.0",
        "probes": [],
        "sha256": {"model.safetensors": "ab" * 32},
        **changes,
    }


KNN = {
    "dataset": "ImageNet-1k",
    "dataset_id": "imagenet-1k",
    "split": "validation",
    "metric": "top-1 (%)",
    "value": 44.1,
    "protocol": "kNN, k=200, T=0.07",
    "num_images": 50000,
}
LINEAR = {**KNN, "value": 60.6, "protocol": "linear, SGD lr 30, 100 epochs"}


def metadata(text):
    return yaml.safe_load(text.split("---")[1])


def test_the_metadata_is_what_the_hub_needs_for_a_timm_model():
    assert metadata(cards.render(facts())) == {
        "license": "cc-by-4.0",
        "library_name": "timm",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "transformers", "image-feature-extraction", "moco", "self-supervised-learning"],
    }


def test_datasets_are_named_when_they_are_known():
    assert metadata(cards.render(facts(datasets=["imagenet-1k"])))["datasets"] == ["imagenet-1k"]


def test_two_protocols_on_one_data_set_survive_the_round_trip_through_the_card():
    card = ModelCard(cards.render(facts(probes=[LINEAR, KNN])))
    assert card.data.model_name == "moco_flowers"
    assert [
        (r.metric_name, r.metric_value, r.dataset_type, r.dataset_split) for r in card.data.eval_results
    ] == [
        ("top-1 (%) (linear, SGD lr 30, 100 epochs)", 60.6, "imagenet-1k", "validation"),
        ("top-1 (%) (kNN, k=200, T=0.07)", 44.1, "imagenet-1k", "validation"),
    ]


def test_a_measured_number_stands_in_one_row_with_its_protocol():
    row = "| ImageNet-1k, validation (50,000 images) | top-1 (%) | 44.1 | kNN, k=200, T=0.07 |"
    assert row in cards.render(facts(probes=[KNN])).splitlines()


def test_a_card_without_probes_says_that_nothing_was_measured():
    text = cards.render(facts())
    assert "Nothing was measured with this model yet." in text
    assert "model-index" not in text


@pytest.mark.parametrize("key", cards.PROBE_KEYS)
def test_a_number_without_its_protocol_is_refused(key):
    with pytest.raises(ValueError, match=f"lacks {key}.*published with its protocol"):
        cards.check_probes([{k: v for k, v in KNN.items() if k != key}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "60.6", True])
def test_a_value_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="is not a finite number"):
        cards.check_probes([{**KNN, "value": value}])


def test_a_value_of_zero_is_a_number():
    assert cards.check_probes([{**KNN, "value": 0}])[0]["value"] == 0


def test_the_facts_are_in_the_table():
    lines = cards.render(facts()).splitlines()
    for row in (
        "| Network | r50: timm `resnet50` |",
        "| Parameters | 23,508,032 |",
        "| Training images | flowers |",
        "| Number of images | 128,116 |",
        "| Steps | 1000 |",
        "| Commit | c0ffee |",
        "| License | cc-by-4.0 |",
        "| temperature | 0.07 |",
        "| augmentation.crop_scale_min | 0.2 |",
    ):
        assert row in lines


def test_facts_that_are_not_known_leave_no_row():
    known = facts()
    for name in ("recipe_name", "recipe", "data", "steps", "epochs", "num_images_seen", "versions", "commit"):
        del known[name]
    text = cards.render(known)
    assert "| None" not in text
    assert "| Steps" not in text
    assert "Every setting" not in text


def test_a_converted_file_is_named_with_its_checksum():
    text = cards.render(facts(origin={"file": "moco_v1.pth.tar", "md5": "b251726a", "arch": "resnet50"}))
    assert "| Converted from | moco_v1.pth.tar (MD5 b251726a) |" in text


def test_text_cannot_leave_its_table_cell():
    text = cards.render(facts(data={"source": "a | b\n\n# Injected"}))
    assert "| Training images | a \\| b # Injected |" in text.splitlines()


@pytest.mark.parametrize(
    "encoder, other", [("query", "moving average"), ("key", "learned by back-propagation")]
)
def test_the_card_says_which_encoder_it_is(encoder, other):
    text = cards.render(facts(encoder=encoder))
    assert f"The {encoder} encoder of a network (`r50`)" in text
    assert other not in text


def test_snippets_use_the_repository_once_it_is_known():
    text = cards.render(facts(repo="our-lab/flowers"))
    for snippet in (
        'mocohub.load("our-lab/flowers")',
        'timm.create_model("hf-hub:our-lab/flowers", pretrained=True)',
        'AutoModel.from_pretrained("our-lab/flowers")',
        "hf download our-lab/flowers",
    ):
        assert snippet in text
    assert 'mocohub.load("ORG/moco_flowers")' in cards.render(facts())


def test_only_our_own_architectures_need_mocohub_imported_before_timm():
    assert cards.render(facts()).count("import mocohub") == 1
    assert "import mocohub  # makes resnet18_cifar known to timm\nimport timm" in cards.render(
        facts(stock_timm=False, architecture="resnet18_cifar")
    )


def test_the_python_snippets_compile():
    text = cards.render(facts(stock_timm=False))
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "card", "exec")


def test_another_license_is_explained_in_the_card():
    text = cards.render(facts(license="other", license_statement="Nobody knows."))
    assert metadata(text)["license_name"] == "see-model-card"
    assert "License: Nobody knows." in text


def test_the_hubs_license_list_has_no_duplicates():
    assert len(set(cards.HUB_LICENSES)) == len(cards.HUB_LICENSES)
    assert {"apache-2.0", "mit", "cc-by-nc-4.0", "other"} <= set(cards.HUB_LICENSES)
