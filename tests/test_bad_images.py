"""Extraction from images as they lie around: each is a row or an error, and no row is another image's."""

import json
import os
import random
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms

from mocohub.features.extract import extract
from mocohub.features.store import Features
from mocohub.images import ImageError, decode_image
from mocohub.sources import list_images
from tests.helpers.bad_images import broken_images, mutated_images, odd_images
from tests.helpers.image_bombs import bombs, harmless_giants
from tests.helpers.image_bytes import encode, picture
from tests.helpers.malice import write_tar

# Features are 8 x 8 pixels, so that they show whose they are.
TRANSFORM = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
OPTIONS = {"transform": TRANSFORM, "dtype": "float32", "progress": False, "batch_size": 7}

ODD, BROKEN = odd_images(), broken_images()
REASON = re.compile(
    "empty file|not a JPEG, PNG, WebP, GIF, BMP or TIFF image|cannot be read: [A-Za-z].+|"
    r"truncated or damaged (JPEG|PNG|WebP|GIF|BMP|TIFF|file) \(.+\)|\d+ x \d+ pixels(, more than .+)?|"
    "cannot be converted from mode .+|(float|integer) pixels .+"
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # about odd metadata


def write(files: dict[str, bytes], reader: str, folder: Path) -> Path:
    """Write the files for one of the two readers."""
    folder.mkdir()
    if reader == "tar":
        write_tar(folder / "images.tar", files)
        return folder / "images.tar"
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def check_complete(features: Features, names: list[str]) -> None:
    """Every input is a row or an error, one of them, under its own name and with a readable reason."""
    found = dict(zip(features.ids.tolist(), features.paths, strict=True))
    assert len(found) == len(features)
    for error in features.errors:
        assert error["id"] not in found
        found[error["id"]] = error["path"]
        assert REASON.fullmatch(error["reason"]), error
        assert len(error["reason"]) < 250 and error["reason"].isprintable()
    assert len(found) == len(features) + len(features.errors)
    assert [found[i].removeprefix("images.tar/") for i in sorted(found)] == names


def alone(data: bytes) -> np.ndarray:
    """Features of one image without any other."""
    return TRANSFORM(decode_image(data)).flatten().numpy()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("reader", ["folder", "tar"])
def test_each_kind_of_image_is_its_own_row_or_error(tmp_path: Path, reader: str, num_workers: int) -> None:
    assert len(ODD) >= 60 and len(BROKEN) >= 50
    files = {**ODD, **{name: data for name, (data, _) in BROKEN.items()}}
    assert len(files) == len(ODD) + len(BROKEN)
    names = sorted(files)
    random.Random(0).shuffle(names)  # a tar keeps this order, a folder is sorted
    files = {name: files[name] for name in names}
    source = write(files, reader, tmp_path / "images")
    features = extract(nn.Flatten(), source, num_workers=num_workers, **OPTIONS)
    check_complete(features, names if reader == "tar" else sorted(names))

    rows = dict(zip(features.paths, features.values, strict=True))
    rows = {path.removeprefix("images.tar/"): row for path, row in rows.items()}
    assert rows.keys() == ODD.keys()
    for name, row in rows.items():
        np.testing.assert_array_equal(row, alone(ODD[name]), err_msg=name)
    for error in features.errors:
        _, reason = BROKEN[error["path"].removeprefix("images.tar/")]
        assert re.match(reason, error["reason"]), error

    distances = torch.cdist(torch.tensor(features.values), torch.tensor(features.values))
    distances.fill_diagonal_(torch.inf)
    assert distances.min() > 0.05  # so a row in another's place would have been seen


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_photo_gives_the_row_of_the_upright_picture(tmp_path: Path, turn: int) -> None:
    """All eight orientations of one picture, each stored so that it is upright again when it is read."""
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    upright = image = picture(7)
    for step in stored[turn]:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = turn
    source = write(
        {"photo.jpg": encode(image, "JPEG", quality=98, subsampling=0, exif=exif)},
        "folder",
        tmp_path / "images",
    )
    row = extract(nn.Flatten(), source, num_workers=0, **OPTIONS).values[0]
    assert np.abs(row - TRANSFORM(upright).flatten().numpy()).max() < 0.03


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_list_names_and_is_no_file_is_an_error(tmp_path: Path, num_workers: int, hashed: bool) -> None:
    """Pipes and devices included, which to open or to read to their end takes for ever."""
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link to a pipe.jpg").symlink_to(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    (tmp_path / "good.jpg").write_bytes(encode(picture(0), "JPEG"))
    (tmp_path / "last.png").write_bytes(encode(picture(1), "PNG"))
    no_file = "cannot be read: it is a pipe or a device, not a file"
    reasons = {
        "missing.jpg": "cannot be read: No such file or directory",
        "folder.jpg": "cannot be read: Is a directory",
        "dangling.jpg": "cannot be read: No such file or directory",
        "circle.jpg": "cannot be read: Too many levels of symbolic links",
        "good.jpg/inside.jpg": "cannot be read: Not a directory",
        "n" * 300 + ".jpg": "cannot be read: File name too long",
        "pipe.jpg": no_file,
        "link to a pipe.jpg": no_file,
        "endless.jpg": no_file,
    }
    if os.geteuid():  # root may read everything
        (tmp_path / "locked.jpg").write_bytes(encode(picture(2), "JPEG"))
        (tmp_path / "locked.jpg").chmod(0)
        reasons["locked.jpg"] = "cannot be read: Permission denied"
    names = ["good.jpg", *reasons, "last.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    images = list_images(tmp_path / "list.txt", check=False)
    options = {"content_hash": hashed, "dedup": hashed, "num_workers": num_workers}
    features = extract(nn.Flatten(), images, **options, **OPTIONS)
    check_complete(features, names)
    assert {error["path"]: error["reason"] for error in features.errors} == reasons
    for name, row in zip(features.paths, features.values, strict=True):
        np.testing.assert_array_equal(row, alone((tmp_path / name).read_bytes()))


def test_links_in_a_folder_that_lead_to_no_file_are_errors(tmp_path: Path) -> None:
    source = write({"good.png": encode(picture(0), "PNG")}, "folder", tmp_path / "images")
    os.mkfifo(tmp_path / "pipe")
    (source / "dangling.png").symlink_to(tmp_path / "nowhere")
    (source / "pipe.png").symlink_to(tmp_path / "pipe")
    features = extract(nn.Flatten(), source, num_workers=0, **OPTIONS)
    check_complete(features, ["dangling.png", "good.png", "pipe.png"])
    assert features.paths == ["good.png"]


def check_mutated(folder: Path, reader: str, count: int) -> None:
    files = mutated_images(count)
    source = write(files, reader, folder)
    features = extract(nn.Flatten(), source, num_workers=2, **{**OPTIONS, "batch_size": 32})
    check_complete(features, list(files))
    assert len(features) > count / 10 and len(features.errors) > count / 10
    for path, row in zip(features.paths, features.values, strict=True):
        np.testing.assert_array_equal(row, alone(files[path.removeprefix("images.tar/")]))
    for error in features.errors:
        with pytest.raises(ImageError, match=re.escape(error["reason"])):
            decode_image(files[error["path"].removeprefix("images.tar/")])


@pytest.mark.parametrize("reader", ["folder", "tar"])
def test_mutated_images_are_their_own_rows_or_errors(tmp_path: Path, reader: str) -> None:
    check_mutated(tmp_path / "images", reader, 400)


@pytest.mark.slow
def test_ten_thousand_mutated_images_are_their_own_rows_or_errors(tmp_path: Path) -> None:
    check_mutated(tmp_path / "images", "tar", 10_000)


def test_bombs_are_refused_within_50_milliseconds_each() -> None:
    assert len(bombs()) >= 20
    for name, (data, reason) in bombs().items():
        times = []
        for _ in range(3):
            start = time.process_time()
            with pytest.raises(ImageError, match=reason):
                decode_image(data)
            times.append(time.process_time() - start)
        assert min(times) < 0.05, name


def test_a_hundred_thousand_frames_cost_no_more_than_the_first() -> None:
    for name, data in harmless_giants().items():
        start = time.process_time()
        decode_image(data)
        assert time.process_time() - start < 0.2, name


MEASURE = """
import json, re, sys
from pathlib import Path
from torch import nn
from torchvision import transforms
from mocohub.features.extract import extract

def held(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

options = {"transform": transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()]),
           "dtype": "float32", "num_workers": 0, "progress": False, "content_hash": True}
extract(nn.Flatten(), [sys.argv[1]], **options)  # what the first call imports
for source in sys.argv[2:]:
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    features = extract(nn.Flatten(), source, **options)
    print(json.dumps([held("VmHWM") - before, features.paths, features.errors]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure a peak")
def test_an_extraction_of_bombs_holds_64_megabytes_more_at_most(tmp_path: Path) -> None:
    files = {**{name: data for name, (data, _) in bombs().items()}, **harmless_giants()}
    sources = [write(files, reader, tmp_path / reader) for reader in ("folder", "tar")]
    (tmp_path / "first.png").write_bytes(encode(picture(0), "PNG"))
    command = [sys.executable, "-c", MEASURE, tmp_path / "first.png", *sources]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 2
    for megabytes, paths, errors in found:
        assert {path.removeprefix("images.tar/") for path in paths} == harmless_giants().keys()
        assert {error["path"].removeprefix("images.tar/") for error in errors} == bombs().keys()
        assert megabytes * 1.048576 <= 64


def test_a_tar_of_images_is_the_one_that_tarfile_reads(tmp_path: Path) -> None:
    """The corpus itself: what the readers get is what was meant."""
    source = write(ODD, "tar", tmp_path / "images")
    with tarfile.open(source) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == ODD
