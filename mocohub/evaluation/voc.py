"""Labels of a VOC-style folder: which classes each image shows, in the layout of VOCdevkit/VOC2007."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from mocohub.features.store import Features
from mocohub.probes.svm import ABSENT, DIFFICULT, PRESENT


@dataclass(frozen=True)
class VOCLabels:
    """What the images of one split show.

    Attributes:
        split: "trainval", "test", ...
        paths: N image files, as `folder/JPEGImages/000005.jpg`; they need not exist.
        labels: (N, num_classes) int8: 1 present, -1 absent, 0 if all objects of the class are difficult.
        classes: Names of the columns, sorted.
    """

    split: str
    paths: list[str]
    labels: np.ndarray
    classes: list[str]

    @property
    def stems(self) -> list[str]:
        """N file names without folder and ending, by which images are known: 000005."""
        return [PurePath(path).stem for path in self.paths]


def read_voc(
    devkit: str | Path, split: str, *, year: int = 2007, classes: Sequence[str] | None = None
) -> VOCLabels:
    """Read the labels of a split.

    They are those of `ImageSets/Main/<class>_<split>.txt`, lines like `000005 -1`. Where a folder has none of
    these files, the images are those of `ImageSets/Main/<split>.txt`, and their labels follow from
    `Annotations/<image>.xml`: a class is present with an object that is not difficult.

    Args:
        devkit: The folder VOCdevkit, or the VOC2007 in it.
        split: "trainval", "test", "train" or "val".
        year: Names the folder in the devkit.
        classes: Names that are expected, for instance those of the training split. Default: all there are.

    Raises:
        FileNotFoundError: If the folder, the list of the split, or an annotation is missing.
        ValueError: If a file cannot be understood, lists of classes differ in their images, or there are
            other classes than those expected.
    """
    root = Path(devkit) / f"VOC{year}"
    if not root.is_dir():
        root = Path(devkit)
    lists = root / "ImageSets" / "Main"
    if not lists.is_dir():
        raise FileNotFoundError(
            f"'{devkit}' has no VOC{year}/ImageSets/Main. Give the folder VOCdevkit, as the archive unpacks."
        )
    files = {path.name.removesuffix(f"_{split}.txt"): path for path in sorted(lists.glob(f"*_{split}.txt"))}
    if files:
        stems, columns = _of_lists(files)
    else:
        stems, columns = _of_annotations(root, lists / f"{split}.txt")
    names = sorted(columns if classes is None else classes)
    # By its annotations a split may lack a class; a name that nobody expects is an error in any case.
    strange, missing = sorted(set(columns) - set(names)), sorted(set(names) - set(columns)) if files else []
    if strange or missing:
        raise ValueError(f"'{root}' has other classes in {split}: {strange} too many, {missing} missing.")
    labels = np.full((len(stems), len(names)), ABSENT, np.int8)
    for number, name in enumerate(names):
        labels[:, number] = columns.get(name, ABSENT)
    return VOCLabels(split, [str(root / "JPEGImages" / f"{stem}.jpg") for stem in stems], labels, names)


def _of_lists(files: dict[str, Path]) -> tuple[list[str], dict[str, list[int]]]:
    """Return the images, and the label of each for every class, from one list for each class."""
    stems, columns = None, {}
    for name, path in files.items():
        lines = [line.split() for line in path.read_text("utf-8").splitlines() if line.strip()]
        wrong = [line for line in lines if len(line) != 2 or line[1] not in ("-1", "0", "1")]
        if wrong:
            raise ValueError(f"'{path}' has a line '{' '.join(wrong[0])}', but lines are like '000005 -1'.")
        images = [image for image, _ in lines]
        _refuse_twice(images, path)
        if stems is not None and images != stems:
            raise ValueError(f"'{path}' lists other images than '{next(iter(files.values()))}'.")
        stems, columns[name] = images, [int(label) for _, label in lines]
    return stems, columns


def _of_annotations(root: Path, file: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Return the same from one list of images and an annotation for each."""
    if not file.is_file():
        raise FileNotFoundError(f"'{file}' does not exist, nor does a list of this split for any class.")
    stems = [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]
    _refuse_twice(stems, file)
    columns: dict[str, list[int]] = {}
    for row, stem in enumerate(stems):
        path = root / "Annotations" / f"{stem}.xml"
        if not path.is_file():
            raise FileNotFoundError(f"'{path}' does not exist, but '{file}' lists its image.")
        try:
            objects = ElementTree.parse(path).getroot().findall("object")
            found = [(o.findtext("name").strip(), int(o.findtext("difficult") or 0)) for o in objects]
        except (ElementTree.ParseError, AttributeError, ValueError) as error:
            raise ValueError(f"'{path}' is no VOC annotation: {error}.") from error
        for name, difficult in found:
            column = columns.setdefault(name, [ABSENT] * len(stems))
            column[row] = max(column[row], DIFFICULT if difficult else PRESENT)
    return stems, columns


def _refuse_twice(stems: list[str], path: Path) -> None:
    if not stems or len(set(stems)) < len(stems):
        twice = next((stem for stem in stems if stems.count(stem) > 1), None)
        raise ValueError(f"'{path}' lists {f'{twice} twice' if twice else 'no image'}.")


def rows_of(features: Features, labels: VOCLabels, known: Iterable[str] = ()) -> np.ndarray:
    """Return the row of features of each labelled image, (N,) int64: images are matched by their stems.

    Args:
        features: Of the split, or of the split and others.
        labels: Of the split.
        known: Stems of the other splits; rows of these are left out.

    Raises:
        ValueError: If an image has no features (with the reason, if there is one), a row has no label, or two
            rows have one stem.
    """
    stems = [PurePath(path).stem for path in features.paths]
    row_of = {stem: row for row, stem in enumerate(stems)}
    if len(row_of) < len(stems):
        twice = next(stem for row, stem in enumerate(stems) if row_of[stem] != row)
        raise ValueError(f"Two rows of the features are called {twice}: labels cannot be told apart.")
    wanted = labels.stems
    lacking = [stem for stem in wanted if stem not in row_of]
    if lacking:
        reasons = {PurePath(error["path"]).stem: error["reason"] for error in features.errors}
        why = reasons.get(lacking[0], "it is not among the images that were extracted")
        raise ValueError(
            f"{len(lacking)} of {len(wanted)} images of {labels.split} have no features, "
            f"the first is {lacking[0]}: {why}. Extract the features of all images again."
        )
    unlabelled = sorted(set(stems) - set(wanted) - set(known))
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(stems)} rows of the features have no label, the first is "
            f"{unlabelled[0]}. Extract the images of the devkit only."
        )
    return np.array([row_of[stem] for stem in wanted])
