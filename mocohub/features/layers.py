"""Features from the inside of a network: which modules, and how their maps become rows."""

import difflib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from mocohub.errors import unknown
from mocohub.hub.heads import CONTRASTIVE, ContrastiveHead

EMBEDDING = "embedding"
POOLS = ("avg", "max", "gem", "none")


class Layer(NamedTuple):
    """Where a column comes from."""

    module: str  # its name in the network; "" is what the model gives when it is asked for no layers
    pool: str  # one of POOLS


def find_layers(model: nn.Module, layers: Sequence[str], pool: str = "avg") -> dict[str, Layer]:
    """Return the module and pooling of each column.

    Args:
        model: The network.
        layers: Names of its modules; stage1 to stage4, which are the last four stages of a network that has
            four or five by timm's `feature_info` (a ResNet's layer1 to layer4), unless its modules have these
            names; "contrastive", what the projection head of `mocohub.load(..., head=True)` gives; or
            "embedding", what the model gives when it is asked for no layers. Each may be followed by a
            pooling, as in "stage4:max".
        pool: Of those that are not.

    Returns:
        By name of the column: that of the layer, with its pooling if the layer is named several times.

    Raises:
        ValueError: If there is no such layer (the closest names are given) or pooling, or one is named twice.
    """
    layers = as_names(layers)
    if pool not in POOLS:
        raise unknown("pool", pool, POOLS)
    stages = getattr(model, "feature_info", None) or []
    stages = [stage["module"] for stage in stages][-4:] if 4 <= len(stages) <= 5 else []
    names = {name: name for name, _ in model.named_modules() if name}
    stages = stages if names.keys() >= set(stages) else []  # timm names modules that a few networks lack
    accepted = {f"stage{i}": name for i, name in enumerate(stages, start=1)} | names | {EMBEDDING: ""}
    asked: list[tuple[str, str]] = []  # layers and their poolings
    if not layers:
        return {EMBEDDING: Layer("", pool)}
    for text in layers:
        layer, colon, own = (text, "", "") if text in accepted else text.rpartition(":")
        layer, own = (layer, own) if colon else (text, pool)
        if layer not in accepted:
            if layer == CONTRASTIVE:
                raise ValueError(
                    f"{type(model).__name__} has no projection head, which gives '{CONTRASTIVE}'. Load it "
                    "with one, from a training run or a checkpoint: mocohub.load(RUN, head=True)."
                )
            near = difflib.get_close_matches(layer, accepted, n=5, cutoff=0.4)
            outer = [name for name in accepted if "." not in name]
            raise unknown("layer", layer, dict.fromkeys(near + outer))
        if layer in names and layer == EMBEDDING:
            raise ValueError(
                f"'{EMBEDDING}' is both what the model gives and a module of {type(model).__name__}. Omit "
                "layers for the former, or name a module inside or around the latter."
            )
        if own not in POOLS:
            raise unknown("pool", own, POOLS)
        if (layer, own) in asked:
            raise ValueError(f"layers names '{text}' twice. Name each layer once, or with another pooling.")
        asked.append((layer, own))
    several = {layer for layer, _ in asked if sum(layer == other for other, _ in asked) > 1}
    return {
        f"{layer}:{own}" if layer in several else layer: Layer(accepted[layer], own) for layer, own in asked
    }


def as_names(layers: Sequence[str]) -> list[str]:
    """Return the names as a list.

    Raises:
        ValueError: If it is one text, of which each letter would be a name.
    """
    if isinstance(layers, str):
        raise ValueError(f"layers is the text '{layers}', but must be a list of names: layers=['{layers}'].")
    return list(layers)


def needs_head(layers: Sequence[str]) -> bool:
    """Whether some layer is the projection head or a part of it."""
    return any(layer.partition(":")[0].partition(".")[0] == CONTRASTIVE for layer in layers)


def pool_output(output: Any, pool: str, *, channels_last: bool = False) -> torch.Tensor:
    """Return (n, D) float32 of what a module gave; for "none" a copy of its maps or tokens.

    Args:
        output: Maps (n, C, H, W), tokens (n, T, D), or rows (n, D), which stay as they are.
        pool: Over the positions or tokens, all of them (a class token is one): "avg" their mean, "max", or
            "gem", the generalised mean of arXiv 1711.02512 with p = 3 of what is above 1e-6; "none" gives
            them themselves, maps as (n, C, H, W).
        channels_last: Whether maps are (n, H, W, C), as in timm's Swin.

    Raises:
        ValueError: If `output` is nothing of the kind.
    """
    if not isinstance(output, torch.Tensor) or output.ndim not in (2, 3, 4):
        found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(
            f"A layer gives {found}, but must give maps (n, C, H, W), tokens (n, T, D) or rows (n, D). "
            "Name a layer around it or inside it."
        )
    channels_last = channels_last and output.ndim == 4
    if pool == "none" or output.ndim == 2:
        values = output.to(torch.float32, copy=True)  # what comes next may write over it
        return values.movedim(-1, 1) if channels_last else values
    values = output.float()
    over = (2, 3) if values.ndim == 4 and not channels_last else tuple(range(1, values.ndim - 1))
    if pool == "max":
        return values.amax(over)
    if pool == "gem":
        return values.clamp(min=1e-6).pow(3).mean(over).pow(1 / 3)
    return values.mean(over)


class LayerOutputs(nn.Module):
    """A network that gives the rows (n, D), or the maps, of several layers from one pass.

    Of a module that is called several times in a pass, the last output counts.
    """

    def __init__(
        self, model: nn.Module, columns: dict[str, Layer], layouts: dict[str, bool] | None = None
    ) -> None:
        """Hook the modules of `columns` (see `find_layers`) until `close` is called.

        Args:
            model: The network.
            columns: See `find_layers`.
            layouts: Whether the maps of a module are channels_last, filled as they are first seen; of
                another object of this class and network if there was one.
        """
        super().__init__()
        self.model, self.columns = model, columns
        self.layouts = {} if layouts is None else layouts
        self.declared = getattr(model, "output_fmt", "NCHW") == "NHWC"
        modules = {layer.module for layer in columns.values()} - {""}
        self.pools = {layer.pool for layer in columns.values() if not layer.module}
        self.head = getattr(model, CONTRASTIVE, None) if needs_head([*modules]) else None
        if isinstance(self.head, ContrastiveHead):
            modules = {module for module in modules if not needs_head([module])}
        else:
            self.head = None
        self.with_classifier = bool(modules)  # for the hooks in it
        self.seen: dict[str, torch.Tensor] = {}
        self.image_px = (1, 1)
        self.hooks = [
            model.get_submodule(layer.module).register_forward_hook(partial(self._see, column, layer))
            for column, layer in columns.items()
            if layer.module
        ]

    def close(self) -> None:
        """Leave the modules as they were."""
        for hook in self.hooks:
            hook.remove()

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the rows or maps of each column, float32, in the order of the columns.

        Raises:
            ValueError: If an output is not maps, tokens or rows, one row or map for each image, or a layer
                was not called.
        """
        self.seen.clear()
        self.image_px = tuple(pixels.shape[-2:])
        whole = self._whole(pixels)
        found = {}
        for column, layer in self.columns.items():
            rows = self.seen.get(column) if layer.module else whole[layer.pool]
            if rows is None:
                raise ValueError(f"Layer '{column}' takes no part in the forward pass. Name another.")
            if rows.shape[:1] != pixels.shape[:1] or (layer.pool != "none" and rows.ndim != 2):
                raise ValueError(
                    f"Layer '{column}' gives {tuple(rows.shape)} for {len(pixels)} images, but features must "
                    "be (n, D). Name a layer with one output for each image."
                )
            found[column] = rows
        self.seen.clear()
        return found

    def _see(self, column: str, layer: Layer, module: nn.Module, args: Any, output: Any) -> None:
        # At once: activations and residual sums may be written over the very same tensor.
        if column not in self.layouts:
            self.layouts[column] = self._is_channels_last(module, output)
        self.seen[column] = pool_output(output, layer.pool, channels_last=self.layouts[column])

    def _is_channels_last(self, module: nn.Module, output: Any) -> bool:
        """Whether maps are (n, H, W, C): such stand inside of many networks that give (n, C, H, W)."""
        if isinstance(module, nn.Conv2d | nn.Linear):
            return isinstance(module, nn.Linear)
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            return False
        image_h, image_w = self.image_px
        first, last = (  # whether these two have the proportions of the image, but for rounding
            abs(h * image_w - w * image_h) <= max(image_h, image_w)
            for h, w in (output.shape[1:3], output.shape[2:4])
        )
        return self.declared if first == last else first

    def _whole(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the network; return what comes before any classifier, under each pooling that is asked for."""
        model, pools = self.model, self.pools | ({"avg"} if self.head is not None else set())
        if not pools:
            model(pixels)
            return {}
        own_head = getattr(model, "forward_head", None)
        classifies = bool(getattr(model, "num_classes", 0))
        found = {}
        if pools != {"avg"} or (classifies and own_head):
            maps = model.forward_features(pixels)
            for pool in pools - {"avg"}:
                found[pool] = pool_output(maps, pool, channels_last=self.declared)
            if own_head and "avg" in pools:
                found["avg"] = own_head(maps, pre_logits=True) if classifies else own_head(maps)
            if own_head and self.with_classifier and (classifies or "avg" not in pools):
                own_head(maps)
        if "avg" in pools:
            features = found["avg"] if "avg" in found else model(pixels)
            if not isinstance(features, torch.Tensor) or features.shape[:-1] != pixels.shape[:1]:
                is_tensor = isinstance(features, torch.Tensor)
                raise ValueError(
                    f"The model gives {tuple(features.shape) if is_tensor else type(features).__name__} for "
                    f"{len(pixels)} images, but features must be (n, D). Give a model that pools, such as "
                    "mocohub.load or timm.create_model(..., num_classes=0) return, or name a module of it: "
                    "layers=[...]."
                )
            found["avg"] = features.to(torch.float32, copy=True)  # the model may use its memory again
            if self.head is not None:
                self.head(features)
        return found
