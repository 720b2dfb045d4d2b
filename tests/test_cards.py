import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.images import write_images
from huggingface_hub import ModelCard

from mocohub.cli import main
from mocohub.files import read_json, write_json
from mocohub.hub import cards, records
from mocohub.hub.zoo import ZOO

MODEL_CARDS = Path(__file__).parents[1] / "model_cards"


@pytest.fixture(autouse=True)
def the_usual_namespace(monkeypatch):
    monkeypatch.delenv("MOCOHUB_NAMESPACE", raising=False)


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


@pytest.mark.parametrize("key", records.PROBE_KEYS)
def test_a_number_without_its_protocol_is_refused(key):
    with pytest.raises(ValueError, match=f"lacks {key}.*published with its protocol"):
        records.check_probes([{k: v for k, v in KNN.items() if k != key}])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "60.6", True])
def test_a_value_that_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="is not a finite number"):
        records.check_probes([{**KNN, "value": value}])


def test_a_value_of_zero_is_a_number():
    assert records.check_probes([{**KNN, "value": 0}])[0]["value"] == 0


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
    origin = {"file": "a.ckpt", "sha256": "ab", "written_by": "lightly", "assumed": "32 px"}
    text = cards.render(facts(origin=origin))
    for row in ("Converted from | a.ckpt (SHA256 ab)", "That file is by | lightly", "Assumed of it | 32 px"):
        assert f"| {row} |" in text


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
        "huggingface-cli download our-lab/flowers",
    ):
        assert snippet in text
    assert "ORG" not in text
    assert "`ORG` stands for whoever publishes" in cards.render(facts())
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
    assert metadata(text)["license_link"] == "https://huggingface.co/ORG/moco_flowers#license"
    assert "## License\n\n`other`: Nobody knows.\n" in text
    assert "ask whoever published this model" in cards.render(facts(license="other"))


def test_the_hubs_license_list_has_no_duplicates():
    assert len(set(cards.HUB_LICENSES)) == len(cards.HUB_LICENSES)
    assert {"apache-2.0", "mit", "cc-by-nc-4.0", "other"} <= set(cards.HUB_LICENSES)


@pytest.mark.parametrize("name", ZOO)
def test_the_card_in_the_repository_is_the_one_that_is_rendered(name):
    text = (MODEL_CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert text == cards.card(name), f"mocohub card {name} --out model_cards/{name}.md"


def test_there_is_one_card_for_each_model_and_none_else():
    assert {path.stem for path in MODEL_CARDS.iterdir()} == {*ZOO, "README"}


@pytest.mark.parametrize("model", [m for m in ZOO.values() if m.bundled], ids=lambda model: model.name)
def test_the_card_of_a_bundled_model_is_rendered_from_its_manifest(model):
    text = (model.bundled_folder / "README.md").read_text(encoding="utf-8")
    assert text == cards.render(read_json(model.bundled_folder / "mocohub.json"))
    cards.check_metadata(text)


@pytest.mark.parametrize("name", ZOO)
def test_the_hub_accepts_the_metadata_of_every_card(name):
    model, data = ZOO[name], cards.check_metadata((MODEL_CARDS / f"{name}.md").read_text(encoding="utf-8"))
    expected = {
        "bundled": ("apache-2.0", None, None),
        "authors": ("other", "not-stated-by-the-authors", "https://github.com/facebookresearch/moco"),
        "none": ("unknown", None, None),
    }
    assert (data.license, data.license_name, data.license_link) == expected[model.weights]
    assert data.datasets == (["imagenet-1k"] if model.data == "ImageNet-1k" else None)
    again = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
    assert again.eval_results == data.eval_results and again.to_dict() == data.to_dict()


@pytest.mark.parametrize(
    ("name", "top1", "url"),
    [
        ("moco_r50_in1m", 60.6, "https://arxiv.org/abs/1911.05722"),
        ("mocov2_r50_in1m", 67.7, "https://github.com/facebookresearch/moco"),
        ("mocov2_r50_in1m_800ep", 71.1, "https://arxiv.org/abs/2003.04297"),
    ],
)
def test_the_authors_number_is_in_the_metadata_with_its_source(name, top1, url):
    (result,) = ModelCard(cards.card(name)).data.eval_results
    assert (result.metric_value, result.source_url) == (top1, url)
    assert (result.dataset_type, result.dataset_split) == ("imagenet-1k", "validation")
    assert "linear probe" in result.metric_name and "published by the authors" in result.metric_name
    assert result.source_name == ZOO[name].source


@pytest.mark.parametrize("name", [name for name, model in ZOO.items() if model.weights == "none"])
def test_the_card_of_an_unpublished_model_says_so_and_what_it_takes(name):
    text, model = cards.card(name), ZOO[name]
    assert "**Nobody has published weights of this model.**" in text
    assert "model-index" not in text and "## Measured" not in text
    assert "with weights that they did not release" in text
    assert f"Training takes {model.cost}." in text
    for command in (
        f"mocohub pretrain {name} --data IMAGES --out RUN",
        f"mocohub export RUN --out {name} --license",
        f"mocohub publish {name} --repo ORG/{name}",
    ):
        assert f"\n{command}" in text


@pytest.mark.parametrize("name", [name for name, model in ZOO.items() if model.weights == "authors"])
def test_the_card_of_an_authors_model_names_their_file_and_what_they_say_of_its_licence(name):
    text, model = cards.card(name), ZOO[name]
    assert model.weights_url in text and f"`{model.weights_md5}`" in text
    assert f"`other`: {model.license}" in text
    assert "Nothing was measured with this model yet." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for row in model.published:
        assert f"| {row.task} | {row.metric} | {row.value} | {row.source} |" in rows


def test_the_second_paper_is_cited_where_the_second_method_was_used():
    cited = {name for name in ZOO if "arXiv:2003.04297" in cards.card(name)}
    assert cited == {"mocov2_r50_in1m", "mocov2_r50_in1m_800ep"}
    assert "arXiv:2003.04297" in cards.render(facts(recipe={"head": "mlp"}))


def test_the_wide_models_are_told_from_torchvisions():
    told = {name for name in ZOO if "wide_resnet50_2" in cards.card(name)}
    assert told == {"moco_r50w2x_in1m", "moco_r50w4x_in1m"}


def converted(**changes):
    origin = {"file": "moco_v1.pth.tar", "md5": "b251726a" + "0" * 24, "head": "linear"}
    return facts(origin=origin, license="other", license_statement="unclear", **changes)


def test_an_export_of_the_authors_file_carries_their_numbers():
    text = cards.render(converted())
    assert "| VOC detection, C4, 07+12 | AP50 / AP / AP75 | 81.5 / 55.9 / 62.6 |" in text
    assert "Numbers of the authors" in text and "## Weights" not in text
    (result,) = cards.check_metadata(text).eval_results
    assert result.metric_value == 60.6
    assert "Numbers of the authors" not in cards.render(facts(recipe_name="moco_r50_in1m"))


def test_the_authors_numbers_are_not_those_of_the_key_encoder():
    text = cards.render(converted(encoder="key"))
    assert "60.6" not in text
    assert metadata(text)["license_name"] == "not-stated-by-the-authors"


def test_measured_and_published_numbers_are_not_mixed_in_the_metadata():
    text = cards.render(converted(probes=[KNN]))
    (result,) = cards.check_metadata(text).eval_results
    assert (result.metric_value, result.source_url) == (44.1, None)
    assert "| ImageNet-1k, linear probe on frozen features | top-1 (%) | 60.6 |" in text


@pytest.fixture
def folder(tmp_path):
    """A model folder as far as cards go."""
    folder = tmp_path / "moco_flowers"
    folder.mkdir()
    write_json(folder / "mocohub.json", facts(probes=[LINEAR]))
    (folder / "README.md").write_text(cards.render(facts(probes=[LINEAR])), encoding="utf-8")
    return folder


def results(tmp_path, *records):
    write_json(tmp_path / "results.json", list(records))
    return tmp_path / "results.json"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_card_of_a_folder_is_its_readme_and_changes_nothing(folder):
    before = contents(folder)
    assert cards.card(folder) == before["README.md"].decode()
    assert contents(folder) == before


def test_results_are_added_to_a_folder_for_good(folder, tmp_path):
    text = cards.card(folder, results=results(tmp_path, KNN))
    assert read_json(folder / "mocohub.json") == facts(probes=[LINEAR, KNN])
    assert cards.card(folder) == text == (folder / "README.md").read_text(encoding="utf-8")
    assert [result.metric_value for result in ModelCard(text).data.eval_results] == [60.6, 44.1]
    assert {*contents(folder)} == {"mocohub.json", "README.md"}


def test_a_newer_number_of_the_same_protocol_takes_the_place_of_the_older(folder, tmp_path):
    newer = {**LINEAR, "value": 60.8}
    other_split = {**LINEAR, "split": "v2", "value": 48.0}
    cards.card(folder, results=results(tmp_path, newer, other_split))
    assert read_json(folder / "mocohub.json")["probes"] == [newer, other_split]
    before = contents(folder)
    cards.card(folder, results=results(tmp_path, newer))
    assert contents(folder) == before


def test_results_that_were_added_by_half_are_added_by_the_next_call(folder, tmp_path):
    before = contents(folder)
    text = cards.card(folder, results=results(tmp_path, KNN))
    (folder / "mocohub.json").write_bytes(
        before["mocohub.json"]
    )  # as a crash between the two files leaves it
    assert cards.card(folder, results=results(tmp_path, KNN)) == text
    assert read_json(folder / "mocohub.json")["probes"] == [LINEAR, KNN]


def test_files_written_anew_are_as_readable_as_new_ones(folder, tmp_path):
    cards.card(folder, results=results(tmp_path, KNN))
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_a_readme_with_somebodys_text_is_not_overwritten(folder, tmp_path):
    with open(folder / "README.md", "a", encoding="utf-8") as file:
        file.write("Mind the thorns.\n")
    before = contents(folder)
    with pytest.raises(ValueError, match="README.md' was edited by hand.*Move it away"):
        cards.card(folder, results=results(tmp_path, KNN))
    assert contents(folder) == before


def test_a_folder_without_readme_gets_one(folder, tmp_path):
    (folder / "README.md").unlink()
    text = cards.card(folder, results=results(tmp_path, KNN))
    assert (folder / "README.md").read_text(encoding="utf-8") == text


def test_results_for_a_model_of_the_zoo_are_shown_and_kept_nowhere(tmp_path):
    text = cards.card("moco_r50_in1m", results=results(tmp_path, KNN))
    assert "| ImageNet-1k, validation (50,000 images) | top-1 (%) | 44.1 | kNN, k=200, T=0.07 |" in text
    assert "44.1" not in cards.card("moco_r50_in1m")


def test_results_for_weights_that_nobody_has_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Nobody has published weights of 'moco_rx50_in1m'.*exported folder"):
        cards.card("moco_rx50_in1m", results=results(tmp_path, KNN))


@pytest.mark.parametrize("content", ["{}", "[1]", '"text"'])
def test_a_file_that_holds_no_results_is_refused(content, folder, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match="results.json' holds no list of measured numbers"):
        cards.card(folder, results=tmp_path / "results.json")


def test_incomplete_results_change_nothing(folder, tmp_path):
    before = contents(folder)
    with pytest.raises(ValueError, match="lacks protocol"):
        cards.card(folder, results=results(tmp_path, KNN, {**KNN, "protocol": ""}))
    assert contents(folder) == before


def test_what_has_no_card_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Unknown model of the zoo 'moco_r50'. Choose one of: moco_r50_in1m"):
        cards.card("moco_r50")
    with pytest.raises(FileNotFoundError, match="nowhere' is no folder that `mocohub export` wrote"):
        cards.card(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no mocohub.json"):
        cards.card(tmp_path)
    write_json(tmp_path / "mocohub.json", {"name": "x"})
    with pytest.raises(
        ValueError, match="mocohub.json' does not hold what `mocohub export` writes: .*license"
    ):
        cards.card(tmp_path)


def test_a_folder_comes_before_the_zoo_as_it_does_for_load(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("moco_r50_in1m")
    assert "# moco_flowers" in cards.card("moco_r50_in1m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("library_name: timm", "library_name: torch"), "library_name 'torch'.*both say timm"),
        (("- timm\n", ""), "tags .*both say timm"),
        (("license: cc-by-4.0", "license: cc-by-5"), "Unknown license.*'cc-by-5'. Choose one of: cc-by-2.5"),
        (("license: cc-by-4.0", "license: other"), "wants license_name and license_link"),
        (("model-index:\n- name:", "model-index:\n- nom:"), "cannot be parsed"),
        (("license: cc-by-4.0", "license: [cc"), "cannot be parsed"),
        (("license: cc-by-4.0", "license: &a cc-by-4.0\nlicense_name: *a"), "aliases"),
        (("license: cc-by-4.0", "license: !!python/object/apply:os.getcwd []"), "cannot be parsed"),
    ],
)
def test_metadata_that_the_hub_would_not_understand_is_refused(change, message):
    text = cards.render(facts(probes=[KNN]))
    assert change[0] in text
    with pytest.raises(ValueError, match=f"(?s){message}"):
        cards.check_metadata(text.replace(*change, 1))


def test_the_verb_prints_a_card_or_writes_it(folder, tmp_path, capsys):
    assert main(["card", "moco_r50_in1m"]) == 0
    assert capsys.readouterr().out == cards.card("moco_r50_in1m")
    arguments = ["--results", str(results(tmp_path, KNN)), "--out", str(tmp_path / "card.md")]
    assert main(["card", str(folder), *arguments]) == 0
    assert re.search(r"\| 44\.1 \|", (tmp_path / "card.md").read_text())
    assert main(["card", "moco_r50"]) == 2
    assert "Choose one of: moco_r50_in1m" in capsys.readouterr().err


def test_the_lines_on_the_card_of_the_bundled_model_run_as_they_stand(tmp_path):
    """In the card's order; transformers' block too, where it is installed."""
    write_images(tmp_path / "photos", {"a": 2}, size_px=40)
    (tmp_path / "photo.jpg").write_bytes((tmp_path / "photos/a/0000.png").read_bytes())
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"MOCOHUB_CACHE": str(tmp_path / "cache")}
    blocks = re.findall(r"```(bash|python)\n(.*?)```", cards.card("moco_tiny_cifar10"), re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "python", "python", "bash"]
    copy, mocohub, timm, transformers = (text for _, text in blocks[:4])
    subprocess.run(copy, shell=True, cwd=tmp_path, env=environment, check=True)
    code = [mocohub, "first = features[0]", timm, "assert features.shape == (1, 128)", "second = features"]
    code += ["assert first.shape == (128,)"]
    if importlib.util.find_spec("transformers"):
        code += [transformers, "assert (features - second).abs().max() < 1e-5"]
    code = "\n".join(code)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def evaluation(tmp_path, *records, **model):
    """results.json of `mocohub evaluate`, as far as cards look at it."""
    record = {
        "dataset": "Flowers", "split": "test", "num_images": 6149, "metric": "top-1 (%)",
        "protocol": "kNN, k=200", "value": 44.1, "n": 1, "std": None, "interval": [42.9, 45.3],
        "interval_over": "test images (Wilson)", "headline": True, "settings": {"grid": [[1, 0.07, 40.0]]},
    }  # fmt: skip
    document = {"format": "mocohub-results/1", "model": {"name": "m", "file_sha256": None, **model}}
    write_json(tmp_path / "results.json", {**document, "results": [{**record, **r} for r in records or [{}]]})
    return tmp_path / "results.json"


def test_headline_numbers_of_an_evaluation_are_taken_with_their_intervals(folder, tmp_path):
    file = evaluation(
        tmp_path,
        {},
        {"protocol": "kNN, k=20", "value": 43.0, "headline": False},
        {"metric": "mAP (%)", "protocol": "retrieval by class", "value": 31.5, "interval": [30.0, 33.0]},
        {"metric": "recall@1 (%)", "protocol": "retrieval by class", "value": 40.25, "interval": None},
    )
    text = cards.card(folder, results=file)
    assert "| Flowers, test (6,149 images) | top-1 (%) | 44.1 [42.9, 45.3] | kNN, k=200 |" in text
    assert "In brackets: 95 % confidence interval." in text
    assert "| recall@1 (%) | 40.25 | retrieval by class |" in text and "kNN, k=20 " not in text
    (_, knn, *_) = read_json(folder / "mocohub.json")["probes"]
    assert knn == {
        "dataset": "Flowers", "split": "test", "num_images": 6149, "metric": "top-1 (%)",
        "protocol": "kNN, k=200", "value": 44.1, "n": 1, "interval": [42.9, 45.3],
    }  # fmt: skip
    assert cards.card(folder, results=file) == text == (folder / "README.md").read_text(encoding="utf-8")
    assert cards.card(folder, results=file.parent) == text  # `evaluate --out`


def test_an_evaluation_survives_the_round_trip_through_the_hubs_card(folder, tmp_path):
    more = {"metric": "mAP (%)", "protocol": "retrieval by class", "value": 31.5, "interval": None}
    text = cards.card(folder, results=evaluation(tmp_path, {}, {"protocol": "linear", "value": 60.0}, more))
    again = ModelCard(str(ModelCard(text))).data.eval_results
    found = {
        (r.task_type, r.metric_type, r.metric_name, r.metric_value, r.dataset_name, r.dataset_split)
        for r in again
    }
    assert found >= {
        ("image-classification", "accuracy", "top-1 (%) (kNN, k=200)", 44.1, "Flowers", "test"),
        ("image-classification", "accuracy", "top-1 (%) (linear)", 60.0, "Flowers", "test"),
        (
            "image-feature-extraction",
            "mean_average_precision",
            "mAP (%) (retrieval by class)",
            31.5,
            "Flowers",
            "test",
        ),
    }
    assert len(again) == 4  # with the one that the folder had
    (retrieval,) = [r for r in again if r.metric_name.startswith("mAP")]
    assert retrieval.task_name == "Image Retrieval"


def test_a_number_without_interval_promises_none(folder, tmp_path):
    assert "In brackets" not in cards.card(folder, results=evaluation(tmp_path, {"interval": None}))


def test_results_of_other_weights_are_refused(folder, tmp_path):
    write_json(folder / "mocohub.json", facts(probes=[LINEAR], sha256={"model.safetensors": "ab" * 32}))
    (folder / "README.md").unlink()
    before = contents(folder)
    with pytest.raises(
        ValueError, match="results are of weights with SHA-256 cdcd.*have abab.*of this model"
    ):
        cards.card(folder, results=evaluation(tmp_path, file_sha256="cd" * 32))
    assert contents(folder) == before
    assert "44.1" in cards.card(folder, results=evaluation(tmp_path, file_sha256="ab" * 32))


def test_results_of_other_weights_than_the_bundled_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="those of 'moco_tiny_cifar10' have"):
        cards.card("moco_tiny_cifar10", results=evaluation(tmp_path, file_sha256="cd" * 32))


def test_results_of_another_architecture_are_refused_where_no_hash_tells(tmp_path):
    with pytest.raises(
        ValueError, match="results are of a resnet18_cifar, but 'moco_r50_in1m' is a resnet50"
    ):
        cards.card("moco_r50_in1m", results=evaluation(tmp_path, architecture="resnet18_cifar"))
    assert "44.1" in cards.card("moco_r50_in1m", results=evaluation(tmp_path, architecture="resnet50"))


def test_an_evaluation_without_headline_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match='has no headline number for a card: set "headline"'):
        cards.card(folder, results=evaluation(tmp_path, {"headline": False}))


def test_an_evaluation_with_half_a_record_changes_nothing(folder, tmp_path):
    before = contents(folder)
    with pytest.raises(ValueError, match="lacks value"):
        cards.card(folder, results=evaluation(tmp_path, {}, {"value": None}))
    assert contents(folder) == before
