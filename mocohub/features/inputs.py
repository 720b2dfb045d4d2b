"""Whatever holds images, as a dataset of preprocessed images or of the reasons why there is none."""

import errno
import hashlib
import json
import logging
import math
import operator
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from mocohub.classes import classes_of_texts
from mocohub.features.writer import NO_LABEL
from mocohub.images import TOO_LARGE, ImageError, open_file, open_image, to_rgb
from mocohub.shards import Shards, find_shards
from mocohub.sources import ImageList, list_images

_log = logging.getLogger(__name__)

# Errors of a disk, a network or a busy machine, not of a file: reading is tried again.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
_RETRY_AFTER_S = (0.5, 2.0, 8.0)


class ImageRow(NamedTuple):
    """One image as the model takes it."""

    id: int
    label: int
    pixels: torch.Tensor  # (C, H, W) float32, or views of the image (V, C, H, W)
    size: tuple[int, int] | None  # upright width and height in px; None if the image came preprocessed
    sha256: str | None  # of the encoded image, if `Inputs.content_hash` asks for it


class TarImage(NamedTuple):
    """One image of a tar that is streamed, before it is decoded."""

    id: int
    path: str
    class_name: str | None
    data: bytes | None  # None if it is larger than any image that can be decoded


class Batch(NamedTuple):
    """What the loader yields: the images that could be read, and the errors of the others."""

    ids: list[int]
    labels: list[int]
    pixels: list[torch.Tensor]  # in runs of one shape (n, [V,] C, H, W); all runs together as long as ids
    errors: list[dict[str, Any]]
    sizes: list[tuple[int, int] | None]
    sha256s: list[str | None]


class Inputs(Dataset):
    """Whatever holds the images as a dataset of `ImageRow`, or of an error for one that cannot be used.

    Attributes:
        images: An `ImageList`, `StoredImages`, `Shards`, a torch Dataset, or a sequence of images in memory.
        is_stream: Whether these are `Shards`: an image is then asked for by what has been read of it, a
            `TarImage`, and there is neither a length nor a path for each.
        source: What it is, for reports.
        paths: A name for each image.
        paths_sha256: Fingerprint of the paths of an `ImageList`; None for others.
        fingerprint: What differs when other images, or the same ones with other labels, are given: SHA-256 of
            paths and labels, or the Hugging Face dataset's own; None if nothing but the number is known.
        classes: Class names, None if unknown.
        in_memory: Whether the images are in memory already.
        transform: From a PIL RGB image to a float tensor (C, H, W), or to several views of it (V, C, H, W);
            None if all images come preprocessed.
        crops: How many views `transform` makes of an image. If these are several, preprocessed images, of
            which no crops can be taken, are errors.
        content_hash: Whether rows carry the SHA-256 of their encoded images.
        least_px: What the shorter side of a JPEG must keep. It is then decoded at 1/2, 1/4 or 1/8 of its size
            if that allows it, which is faster and changes features a little. None: at its size.
    """

    def __init__(self, images: Any) -> None:
        """Look at what was given; no image is read.

        Raises:
            FileNotFoundError: If a file that is named does not exist.
            ValueError: If there are no images, or they have no positions.
        """
        is_sequence = isinstance(images, list | tuple | np.ndarray | torch.Tensor) and len(images) > 0
        self.in_memory = is_sequence and isinstance(images[0], np.ndarray | torch.Tensor | Image.Image)
        if self.in_memory and getattr(images, "ndim", 4) not in (1, 4):  # 1: an array of objects
            raise ValueError(
                f"images is one {type(images).__name__} of shape {tuple(images.shape)}, but must be "
                "several images: uint8 (N, H, W, 3), or preprocessed (N, C, H, W). Give one image as [image]."
            )
        if isinstance(images, IterableDataset | DataLoader) or (
            isinstance(images, Dataset) and not hasattr(images, "__len__")
        ):
            raise ValueError(
                f"images is a {type(images).__name__} without length and positions. Give a map-style Dataset."
            )
        if isinstance(images, Mapping):  # a DatasetDict of the datasets library is one
            names = [str(name) for name in images]
            raise ValueError(
                f"images is a {type(images).__name__} of {', '.join(names[:5])}. Give one of its entries."
            )
        if hasattr(images, "cast_column"):
            images = StoredImages(images)
        elif not self.in_memory and not isinstance(images, Dataset | ImageList | Shards):
            shards = find_shards(images)
            images = list_images(images) if shards is None else shards
        self.images = images
        self.is_stream = isinstance(images, Shards)
        self.transform: Callable[[Image.Image], torch.Tensor] | None = None
        self.content_hash = False
        self.crops = 1
        self.least_px: int | None = None
        classes = getattr(images, "classes", None)  # of a Dataset it may be anything
        is_names = isinstance(classes, list | tuple | np.ndarray)
        self.classes: list[str] | None = [str(name) for name in classes] if is_names else None
        self.paths_sha256 = self.fingerprint = None
        if isinstance(images, ImageList):
            self.source, self.paths, self.paths_sha256 = images.source, images.paths, images.fingerprint()
            facts = json.dumps([self.paths_sha256, images.labels, images.classes])
            self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()
        elif self.is_stream:
            self.source, self.paths, self.fingerprint = images.source, [], images.fingerprint()
            return
        else:
            self.source = "images in memory" if self.in_memory else type(images).__name__
            self.paths = Numbered(len(images))
        if isinstance(images, StoredImages):
            self.source, self.fingerprint = images.source, images.fingerprint
        if len(self) == 0:
            raise ValueError(f"There are no images: {self.source} is empty.")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int | TarImage) -> ImageRow | dict[str, Any]:
        number, path = (i.id, i.path) if isinstance(i, TarImage) else (i, self.paths[i])
        try:
            image, label, size, sha256 = self._read_patiently(i, path)
            label = NO_LABEL if label is None else _integer(label)
            if not -(2**63) <= label < 2**63:
                raise ImageError(f"its label, {label}, is beyond int64")
            pixels, decoded_size = self._pixels(image)
            return ImageRow(number, label, pixels, size or decoded_size, sha256)
        except ImageError as error:
            reason = str(error)
        except Exception as error:  # a Dataset or transform that is not ours may raise anything
            reason = f"{type(error).__name__}: {error}"
        return {"id": number, "path": path, "reason": reason}

    def content_sha256(self, i: int) -> str | None:
        """SHA-256 of the encoded bytes of image `i`; None if there are none or they cannot be read."""
        if not isinstance(self.images, ImageList | StoredImages):
            return None
        try:
            return hashlib.sha256(_data(self.images.encoded(i))).hexdigest()
        except ImageError:  # the reason why it has no features
            return None

    def _read_patiently(
        self, i: int | TarImage, path: str
    ) -> tuple[Any, Any, tuple[int, int] | None, str | None]:
        for wait_s in _RETRY_AFTER_S:
            try:
                return self._read(i)
            except ImageError as error:
                if getattr(error.__cause__, "errno", None) not in _PASSING:
                    raise
                # Said, as many of them look like a hang.
                _log.warning("'%s' %s. It is read again in %g s.", path, error, wait_s)
                time.sleep(wait_s)
        return self._read(i)

    def _read(self, i: int | TarImage) -> tuple[Any, Any, tuple[int, int] | None, str | None]:
        """Return image, label, its size undiminished and the SHA-256 of its bytes, None where unknown."""
        if isinstance(self.images, ImageList | StoredImages | Shards):
            encoded, label, sha256 = self._encoded(i), self.images.labels, None
            if self.content_hash:
                encoded = _data(encoded)
                sha256 = hashlib.sha256(encoded).hexdigest()
            with open_image(encoded) as opened:
                shrink = 1 if self.least_px is None else opened.largest_shrink(self.least_px)
                return opened.decode(shrink), label and label[i], opened.size, sha256
        item = self.images[i]
        if isinstance(item, tuple | list) and len(item) in (1, 2):  # 1: a TensorDataset of images alone
            return (*item, None, None, None)[:4]
        return item, None, None, None

    def _encoded(self, i: int | TarImage) -> bytes | Path:
        if not isinstance(i, TarImage):
            return self.images.encoded(i)
        if i.data is None:
            raise ImageError(TOO_LARGE)
        return i.data

    def _pixels(self, image: Any) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """Return what the model takes, and the size of the image that was given; None for a tensor."""
        size, accepted, num_dims = None, "float (C, H, W)", (3,)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ImageError(
                    f"array is {image.dtype} {image.shape}, but must be uint8 (H, W, 3), or a float tensor "
                    "(C, H, W) if it is preprocessed"
                )
            image = Image.fromarray(image)
        if isinstance(image, Image.Image):
            if self.transform is None:
                raise ImageError("the model has no pretrained_cfg to preprocess it by; give transform=...")
            image = to_rgb(image)
            size = image.size
            accepted, num_dims = "float (C, H, W), or views (V, C, H, W)", (3, 4)
            image = self.transform(image)
            if not isinstance(image, torch.Tensor):
                kind = type(image).__name__
                raise ImageError(f"the transform gives {kind}, but must give a tensor: {accepted}")
        elif self.crops > 1 and isinstance(image, torch.Tensor):
            raise ImageError("it is preprocessed, but crops have to be taken before that; omit crops")
        if not isinstance(image, torch.Tensor):
            raise ImageError(
                f"got {type(image).__name__}, but need an image, a float tensor (C, H, W), or (image, label)"
            )
        if image.ndim not in num_dims or not image.is_floating_point() or len(image) == 0:
            raise ImageError(f"tensor is {image.dtype} {tuple(image.shape)}, but must be {accepted}")
        image = image.detach().to("cpu", torch.float32)  # where loaders join, and pin, what came from a card
        if not math.isfinite(image.sum()):
            raise ImageError("the preprocessed image has values that are not finite")
        return image, size


def _integer(label: Any) -> int:
    try:
        return operator.index(label)
    except TypeError:
        raise ImageError(f"its label is {label!r}, but must be an integer") from None


class Numbered(Sequence):
    """Names images[0], images[1] and so on, made when they are asked for: a million of them are 70 MB."""

    def __init__(self, count: int) -> None:
        """So many."""
        self._numbers = range(count)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> str:
        return f"images[{self._numbers[i]}]"


class StoredImages:
    """A map-style dataset of the Hugging Face `datasets` library, its images as the encoded bytes it stores.

    They are decoded here, as every other image is, and the library is not imported.

    Attributes:
        source: Names of its class and its column, for reports.
        labels: For each image its class, None if there is no column of classes, nor one called label of
            integers or texts, which are classes as those of a list file are.
        classes: Their names, None likewise.
        fingerprint: What the library calls so; it changes with every change of the dataset.
    """

    def __init__(self, dataset: Any) -> None:
        """Find the columns of images and labels by the types of the features.

        Raises:
            ValueError: If there is not one column of images, or the dataset has a transform.
        """
        features = dataset.features or {}
        columns = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        if len(columns) != 1:
            raise ValueError(
                f"The dataset has {len(columns)} columns of images, but must have one; all columns are "
                f"{list(features)}. Use dataset.remove_columns, or cast_column(name, datasets.Image())."
            )
        if dataset.format["type"] == "custom":
            raise ValueError(
                "The dataset has a transform of its own. Give it dataset.with_format(None), "
                "and the transform of its images as transform=..."
            )
        (self._column,) = columns
        self.source = f"{type(dataset).__module__.partition('.')[0]}.{type(dataset).__name__}: {self._column}"
        self.fingerprint: str | None = getattr(dataset, "_fingerprint", None)
        kinds = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
        label = "label" if "label" in kinds else kinds[0] if len(kinds) == 1 else None
        plain = dataset.with_format(None)
        self.labels: list[int | None] | None = label and list(plain[label])
        self.classes: list[str] | None = label and list(features[label].names)
        if label is None and re.match(
            "u?int|string|large_string", str(getattr(features.get("label"), "dtype", ""))
        ):
            self.labels, self.classes = classes_of_texts(
                [None if one is None else str(one) for one in plain["label"]]
            )
        undecoded = type(features[self._column])(decode=False)
        self._rows = plain.select_columns([self._column]).cast_column(self._column, undecoded)

    def __len__(self) -> int:
        return len(self._rows)

    def encoded(self, i: int) -> bytes | Path:
        """Return image `i` as `mocohub.images.open_image` takes it.

        Raises:
            ImageError: If the row has no image.
        """
        stored = self._rows[i][self._column] or {}
        if stored.get("bytes") is not None:
            return stored["bytes"]
        if stored.get("path") is None:
            raise ImageError("the row has no image")
        return Path(stored["path"])


def _data(encoded: bytes | Path) -> bytes:
    if isinstance(encoded, bytes):
        return encoded
    with open_file(encoded) as file:
        try:
            return file.read()
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error


def collate(items: list[ImageRow | dict[str, Any]]) -> Batch:
    """Join images of one shape that follow one another; the loader's `collate_fn`."""
    images = [item for item in items if isinstance(item, ImageRow)]
    runs = groupby((image.pixels for image in images), key=lambda pixels: pixels.shape)
    return Batch(
        ids=[image.id for image in images],
        labels=[image.label for image in images],
        pixels=[_stacked(run) for _, run in runs],
        errors=[item for item in items if isinstance(item, dict)],
        sizes=[image.size for image in images],
        sha256s=[image.sha256 for image in images],
    )


def _stacked(run: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return images ([V,] C, H, W) as one tensor (n, [V,] C, H, W), channels_last as the network wants it."""
    return default_collate([pixels.movedim(-3, -1) for pixels in run]).movedim(-1, -3)
