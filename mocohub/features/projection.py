"""Principal components of features, whitened or not, as a transform that is stored and says what it is.

PCA as in scikit-learn (its signs included), but from a mean and a covariance that are added up block by block
in float64, so that a feature folder may be larger than memory.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mocohub.features.layouts import FeatureFolder
from mocohub.features.store import Features
from mocohub.features.writer import FeatureWriter
from mocohub.files import atomic_folder, refuse_existing
from mocohub.probes.inputs import BLOCK_ROWS, row_blocks
from mocohub.probes.spectrum import moments, rounding_variance

_FORMAT = "mocohub-projection/1"
_TENSORS = ("mean", "components", "variances")


@dataclass(frozen=True, eq=False)
class Projection:
    """A linear map of features (n, D) to fewer (n, k): centred, along principal components, perhaps whitened.

    >>> rows = np.random.default_rng(0).normal(size=(100, 8)).astype("float32")
    >>> projection = Projection.fit(rows, num_components=2)
    >>> projection(rows).shape
    (100, 2)

    Attributes:
        mean: Of the features, (D,) float64.
        components: Orthonormal directions of largest variance first, (k, D) float64.
        variances: Along each of them, with n - 1 in the denominator, (k,) float64.
        whiten: Whether each component is divided by its standard deviation.
        fitted_on: Number of rows, and what `meta` said of the model that made them.
    """

    mean: np.ndarray = field(repr=False)
    components: np.ndarray = field(repr=False)
    variances: np.ndarray = field(repr=False)
    whiten: bool
    fitted_on: dict[str, Any] = field(repr=False)

    @classmethod
    def fit(
        cls, features: Features | np.ndarray | str | Path, num_components: int, *, whiten: bool = False
    ) -> "Projection":
        """Find the principal components.

        Args:
            features: Features, an array (N, D), or a feature folder, which is read block by block.
            num_components: k.
            whiten: Divide each component by its standard deviation, so that all count alike.

        Raises:
            ValueError: If there are fewer than two rows or k directions with any variance, or a value is not
                finite.
        """
        if isinstance(features, str | Path):
            folder = FeatureFolder(features)
            meta, blocks = folder.manifest["meta"], folder.blocks()
        else:
            meta = features.meta if isinstance(features, Features) else {}
            blocks = row_blocks(features)
        count, mean, scatter = moments(blocks)
        width = len(mean)
        if not 1 <= num_components <= min(width, count - 1):
            raise ValueError(
                f"num_components is {num_components}, but {count} rows of {width} features have at most "
                f"{max(min(width, count - 1), 0)} principal components. Give fewer, or more rows."
            )
        covariance = scatter / (count - 1)
        variances, vectors = np.linalg.eigh(covariance)  # ascending
        total = variances.sum()
        variances, components = variances[::-1][:num_components], vectors.T[::-1][:num_components]
        varied = int((variances > rounding_variance(covariance)).sum())
        if varied < num_components:
            raise ValueError(
                f"num_components is {num_components}, but these features vary in {varied} directions only. "
                f"Give {varied} or fewer."
            )
        largest = np.abs(components).argmax(1)
        components = components * np.sign(components[np.arange(num_components), largest])[:, None]
        fitted_on = {name: meta[name] for name in ("model", "transform", "normalized") if name in meta}
        share = float(variances.sum() / total)
        return cls(
            mean, components, variances, whiten, {"rows": count, "explained_variance": share, **fitted_on}
        )

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return features (n, D) as (n, k) float32; a row does not depend on the others.

        Raises:
            ValueError: If they are not (n, D).
        """
        values = np.asarray(values)
        if values.ndim != 2 or values.shape[1] != len(self.mean):
            raise ValueError(
                f"The projection takes features (n, {len(self.mean)}), but got {values.shape}. "
                "Fit one on features of this model."
            )
        scale = np.sqrt(self.variances) if self.whiten else 1.0
        projected = np.empty((len(values), self.num_components), np.float32)
        for start in range(0, len(values), BLOCK_ROWS):
            block = values[start : start + BLOCK_ROWS].astype(np.float64) - self.mean
            projected[start : start + BLOCK_ROWS] = block @ self.components.T / scale
        return projected

    @property
    def num_components(self) -> int:
        """Features of a projected row, k."""
        return len(self.components)

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies it, as JSON values, for the `meta` of features that were projected."""
        digest = hashlib.sha256(b"".join(getattr(self, name).astype("<f8").tobytes() for name in _TENSORS))
        return {
            "name": "pca",
            "num_components": self.num_components,
            "whiten": self.whiten,
            "sha256": digest.hexdigest(),
            "fitted_on": self.fitted_on,
        }

    def apply(self, features: Features) -> Features:
        """Return projected features with the same ids, paths, labels and errors; `meta` says by what.

        Raises:
            ValueError: If they are of another model or preprocessing than those it was fitted on, or are
                projected already.
        """
        self.check(features.meta)
        return Features(
            {next(iter(features.columns)): self(features.values)},
            features.ids,
            features.paths,
            features.labels,
            features.classes,
            features.errors,
            {**features.meta, "projection": self.facts},
            features.extras,
        )

    def apply_to_folder(self, folder: str | Path, out: str | Path) -> Path:
        """Write the projection of a feature folder as another one, block by block; `meta` says by what.

        It has the same shards, ids, paths, labels, errors and type of numbers. Of several columns of features
        the first is projected, and the others are left out.

        Args:
            folder: A feature folder of any layout.
            out: Feature folder (Parquet) to write, complete or not at all.

        Returns:
            The new folder.

        Raises:
            FileExistsError: If something is at `out`.
            FileNotFoundError: If `folder` is no feature folder, or lacks a file.
            ValueError: If it is damaged or has no rows, as in `apply`, or if a value is beyond float16.
        """
        refuse_existing(out)
        source = FeatureFolder(folder)
        self.check(source.manifest["meta"])
        if not sum(source.num_rows):
            raise ValueError(f"'{folder}' has no rows, so there is nothing to project.")
        column, meta = next(iter(source.columns)), {**source.manifest["meta"], "projection": self.facts}
        with atomic_folder(out) as temporary:
            classes = source.manifest["classes"]
            writer = FeatureWriter(temporary, num_shards=len(source.num_rows), classes=classes, meta=meta)
            for shard in range(len(source.num_rows)):
                for rows in source.rows(shard):
                    values = self(rows.values[column])
                    if not (np.abs(values) <= np.finfo(source.dtype).max).all():
                        raise ValueError(
                            f"Projected rows of shard {shard} are beyond {source.dtype}. Extract in float32."
                        )
                    values = {column: values.astype(source.dtype)}
                    writer.write(shard, rows.ids, rows.paths, rows.labels, values, rows.extras)
            writer.close(source.errors(), num_inputs=source.manifest["num_inputs"])
        return Path(out)

    def check(self, meta: dict[str, Any]) -> None:
        """Refuse features whose `meta` differs from that of the features it was fitted on.

        Raises:
            ValueError: As in `apply`.
        """
        if meta.get("projection"):
            raise ValueError("The features are projected already. Give those of the model itself.")
        for name in ("model", "transform", "normalized"):
            fitted, given = _identity(self.fitted_on.get(name)), _identity(meta.get(name))
            if fitted is not None and given is not None and fitted != given:
                raise ValueError(
                    f"The projection was fitted on features with {name} {fitted}, but these have {given}. "
                    "Fit one on features of this model."
                )

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file, complete or absent, with `facts` in its header.

        Raises:
            FileExistsError: If something is there already.
            ValueError: If the name does not end in .safetensors.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"A projection is a .safetensors file, not '{path}'. Name it so.")
        refuse_existing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(getattr(self, name), np.float64) for name in _TENSORS}
        # One entry, as safetensors writes several in no order.
        data = save(tensors, {"mocohub": json.dumps({"format": _FORMAT, **self.facts}, sort_keys=True)})
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def open(cls, path: str | Path) -> "Projection":
        """Read a file of `save`.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is damaged or no projection.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"'{path}' does not exist. Give a file that Projection.save wrote.")
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get("mocohub", "{}"))
                if facts.pop("format", None) != _FORMAT:
                    raise ValueError(f"its header does not say {_FORMAT}")
                tensors = [file.get_tensor(name) for name in _TENSORS]
                projection = cls(*tensors, facts["whiten"], facts["fitted_on"])
            shapes = [tensor.shape for tensor in tensors]
            if shapes[1] != shapes[2] + shapes[0] or len(shapes[1]) != 2 or projection.facts != facts:
                raise ValueError("its numbers are not those that its header tells")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"'{path}' is no projection that can be read: {error}. Copy it again, or fit it again."
            ) from error
        return projection


def _identity(facts: Any) -> Any:
    """Facts without the name, since a model's name is where it was loaded from."""
    return {k: v for k, v in facts.items() if k != "name"} if isinstance(facts, dict) else facts
