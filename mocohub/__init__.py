"""mocohub: the hub and feature extractor for Momentum Contrast (MoCo, arXiv 1911.05722), on timm."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from mocohub.evaluation.evaluate import evaluate as evaluate
    from mocohub.evaluation.linear import linear_protocol as linear_protocol
    from mocohub.features.extract import extract as extract
    from mocohub.features.store import Features as Features
    from mocohub.hub.export import export as export
    from mocohub.hub.load import load as load
    from mocohub.hub.load import transform as transform
    from mocohub.pretrain.loop import train as train
    from mocohub.pretrain.recipe import Recipe as Recipe
    from mocohub.probes.health import health as health
    from mocohub.probes.knn import KNNProbe as KNNProbe
    from mocohub.probes.knn import knn_grid as knn_grid
    from mocohub.probes.linear import LinearProbe as LinearProbe
    from mocohub.probes.lowshot import low_shot as low_shot
    from mocohub.probes.retrieval import retrieval as retrieval
    from mocohub.sources import list_images as list_images

# Public name -> where it lives. Imported on first use, so that `mocohub --help` need not wait for torch.
_PUBLIC = {
    "Features": "mocohub.features.store",
    "KNNProbe": "mocohub.probes.knn",
    "LinearProbe": "mocohub.probes.linear",
    "Recipe": "mocohub.pretrain.recipe",
    "evaluate": "mocohub.evaluation.evaluate",
    "export": "mocohub.hub.export",
    "extract": "mocohub.features.extract",
    "health": "mocohub.probes.health",
    "knn_grid": "mocohub.probes.knn",
    "linear_protocol": "mocohub.evaluation.linear",
    "list_images": "mocohub.sources",
    "load": "mocohub.hub.load",
    "low_shot": "mocohub.probes.lowshot",
    "retrieval": "mocohub.probes.retrieval",
    "train": "mocohub.pretrain.loop",
    "transform": "mocohub.hub.load",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mocohub' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterWithTimm(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Adds our small-image networks to timm's registry the moment timm is imported, without importing it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path.remove(self)
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        importlib.import_module("mocohub.backbones")


if "timm" in sys.modules:
    importlib.import_module("mocohub.backbones")
else:
    sys.meta_path.insert(0, _RegisterWithTimm())
