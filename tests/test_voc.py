from pathlib import Path

import numpy as np
import pytest

from mocohub.evaluation.voc import read_voc, rows_of
from mocohub.features.store import Features

# Of every image: the objects (class, difficult) that it shows.
IMAGES = {
    "000005": [("chair", 0), ("chair", 1)],
    "000007": [("car", 0)],
    "000009": [("chair", 1), ("person", 0)],
    "000012": [],
}
CLASSES = ["car", "chair", "person"]
LABELS = [[-1, 1, -1], [1, -1, -1], [-1, 0, 1], [-1, -1, -1]]


def write_annotations(devkit: Path, images=IMAGES, split="trainval") -> Path:
    root = devkit / "VOC2007"
    for folder in (root / "Annotations", root / "ImageSets" / "Main"):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in images))
    for stem, objects in images.items():
        parts = [
            f"<object><name>{name}</name><pose>Rear</pose><difficult>{difficult}</difficult>"
            "<bndbox><xmin>1</xmin></bndbox></object>"
            for name, difficult in objects
        ]
        text = f"<annotation><filename>{stem}.jpg</filename>{''.join(parts)}</annotation>"
        (root / "Annotations" / f"{stem}.xml").write_text(text)
    return devkit


def write_lists(devkit: Path, split="trainval") -> Path:
    lists = devkit / "VOC2007" / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    for name, labels in zip(CLASSES, np.array(LABELS).T, strict=True):
        lines = [f"{stem} {label:2d}\n" for stem, label in zip(IMAGES, labels, strict=True)]
        (lists / f"{name}_{split}.txt").write_text("".join(lines))
    return devkit


@pytest.mark.parametrize("write", [write_lists, write_annotations])
def test_lists_of_classes_and_annotations_say_the_same(tmp_path, write):
    labels = read_voc(write(tmp_path), "trainval")
    assert labels.classes == CLASSES and labels.split == "trainval"
    assert labels.labels.tolist() == LABELS and labels.labels.dtype == np.int8
    assert labels.stems == list(IMAGES)
    assert labels.paths[0] == str(tmp_path / "VOC2007" / "JPEGImages" / "000005.jpg")
    inside = read_voc(tmp_path / "VOC2007", "trainval")
    assert inside.paths == labels.paths


def test_a_list_of_one_split_is_not_taken_for_another(tmp_path):
    write_lists(tmp_path, "trainval")
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "car_val.txt").write_text("000007  1\n")
    assert read_voc(tmp_path, "val").classes == ["car"]
    assert read_voc(tmp_path, "trainval").classes == CLASSES


def test_annotations_of_a_split_may_lack_a_class_of_the_other(tmp_path):
    write_annotations(tmp_path)
    write_annotations(tmp_path, {"000013": [("person", 0)]}, "test")
    test = read_voc(tmp_path, "test", classes=CLASSES)
    assert test.classes == CLASSES and test.labels.tolist() == [[-1, -1, 1]]
    with pytest.raises(ValueError, match=r"other classes in test: \['person'\] too many, \[\] missing"):
        read_voc(tmp_path, "test", classes=["car"])
    with pytest.raises(ValueError, match=r"\[\] too many, \['dog'\] missing"):
        read_voc(write_lists(tmp_path), "trainval", classes=[*CLASSES, "dog"])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no VOC2007/ImageSets/Main. Give the folder VOCdevkit"):
        read_voc(tmp_path, "trainval")
    write_annotations(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no VOC2012/ImageSets/Main"):
        read_voc(tmp_path, "trainval", year=2012)
    with pytest.raises(FileNotFoundError, match=r"test.txt' does not exist, nor does a list of this split"):
        read_voc(tmp_path, "test")
    (tmp_path / "VOC2007" / "Annotations" / "000007.xml").unlink()
    with pytest.raises(FileNotFoundError, match=r"000007.xml' does not exist, but .* lists its image"):
        read_voc(tmp_path, "trainval")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("000005 2\n", "has a line '000005 2', but lines are like '000005 -1'"),
        ("000005\n", "has a line '000005'"),
        ("000005 1\n000005 1\n", "lists 000005 twice"),
        ("\n", "lists no image"),
        ("000005 1\n000007 -1\n", "person_trainval.txt' lists other images than '.*car_trainval.txt'"),
    ],
)
def test_lists_that_cannot_be_understood_are_refused(tmp_path, lines, message):
    write_lists(tmp_path)
    (tmp_path / "VOC2007" / "ImageSets" / "Main" / "person_trainval.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_voc(tmp_path, "trainval")


@pytest.mark.parametrize("text", ["<annotation>", "<a><object><pose/></object></a>", "not xml"])
def test_annotations_that_cannot_be_understood_are_refused(tmp_path, text):
    write_annotations(tmp_path)
    (tmp_path / "VOC2007" / "Annotations" / "000009.xml").write_text(text)
    with pytest.raises(ValueError, match="000009.xml' is no VOC annotation"):
        read_voc(tmp_path, "trainval")


def features(stems, errors=()):
    paths = [f"JPEGImages/{stem}.png" for stem in stems]
    return Features(np.zeros((len(paths), 2), np.float32), ids=range(len(paths)), paths=paths, errors=errors)


def test_rows_are_found_by_the_names_of_the_images(tmp_path):
    labels = read_voc(write_lists(tmp_path), "trainval")
    found = rows_of(features(["000012", "000100", "000009", "000007", "000005"]), labels, known=["000100"])
    assert found.tolist() == [4, 3, 2, 0]


def test_images_without_features_or_labels_are_refused(tmp_path):
    labels = read_voc(write_lists(tmp_path), "trainval")
    errors = [{"id": 9, "path": "JPEGImages/000005.jpg", "reason": "truncated JPEG"}]
    with pytest.raises(
        ValueError, match="1 of 4 images of trainval have no features, the first is 000005: trunc"
    ):
        rows_of(features(["000007", "000009", "000012"], errors), labels)
    with pytest.raises(
        ValueError, match="the first is 000009: it is not among the images that were extracted"
    ):
        rows_of(features(["000005", "000007"]), labels)
    with pytest.raises(ValueError, match="1 of 5 rows of the features have no label, the first is 000100"):
        rows_of(features([*IMAGES, "000100"]), labels)
    with pytest.raises(ValueError, match="Two rows of the features are called 000005"):
        rows_of(features([*IMAGES, "000005"]), labels)
