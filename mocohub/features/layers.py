"""Features from the inside of a network: which modules, and how their maps become rows."""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mocohub.errors import unknown

EMBEDDING = "embedding"
POOLS = ("avg", "max", "gem")


def find_layers(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """Return the module of each column, both as names; the module of "embedding" is "".

    Args:
        model: The network.
        layers: Names of its modules; stage1 to stage4, which are the last four stages of a network that has
            four or five by timm's `feature_info` (a ResNet's layer1 to layer4), unless its modules have these
            names; or "embedding", what the model gives when it is asked for no layers.

    Raises:
        ValueError: If there is no such layer (the closest names are given), or one is named twice.
    """
    if isinstance(layers, str):
        raise ValueError(f"layers is the text '{layers}', but must be a list of names: layers=['{layers}'].")
    stages = getattr(model, "feature_info", None) or []
    stages = [stage["module"] for stage in stages][-4:] if 4 <= len(stages) <= 5 else []
    names = {name: name for name, _ in model.named_modules() if name}
    accepted = {f"stage{i}": name for i, name in enumerate(stages, start=1)} | names | {EMBEDDING: ""}
    for layer in layers:
        if layer not in accepted:
            near = difflib.get_close_matches(layer, accepted, n=5, cutoff=0.4)
            outer = [name for name in accepted if "." not in name]
            raise unknown("layer", layer, dict.fromkeys(near + outer))
        if layers.count(layer) > 1:
            raise ValueError(f"layers names '{layer}' twice. Name each layer once.")
    return {layer: accepted[layer] for layer in layers or [EMBEDDING]}


def pool_output(output: Any, pool: str, *, channels_last: bool = False) -> torch.Tensor:
    """Return (n, D) float32 of what a module gave.

    Args:
        output: Maps (n, C, H, W), tokens (n, T, D), or rows (n, D), which stay as they are.
        pool: Over the positions or tokens, all of them (a class token is one): "avg" their mean, "max", or
            "gem", the generalised mean of arXiv 1711.02512 with p = 3 of what is above 1e-6.
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
    values = output.float()
    if values.ndim == 2:
        return values
    over = (2, 3) if values.ndim == 4 and not channels_last else tuple(range(1, values.ndim - 1))
    if pool == "max":
        return values.amax(over)
    if pool == "gem":
        return values.clamp(min=1e-6).pow(3).mean(over).pow(1 / 3)
    return values.mean(over)


class LayerOutputs(nn.Module):
    """A network that gives the rows (n, D) of several layers, from one pass.

    Of a module that is called several times in a pass, the last output counts.
    """

    def __init__(self, model: nn.Module, columns: dict[str, str], pool: str) -> None:
        """Hook the modules of `columns` (see `find_layers`) until `close` is called."""
        super().__init__()
        self.model, self.columns, self.pool = model, columns, pool
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        self.with_head = any(columns.values())
        self.seen: dict[str, torch.Tensor] = {}
        self.hooks = [
            model.get_submodule(name).register_forward_hook(partial(self._see, column))
            for column, name in columns.items()
            if name
        ]

    def close(self) -> None:
        """Leave the modules as they were."""
        for hook in self.hooks:
            hook.remove()

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the rows of each column, float32, in the order of the columns.

        Raises:
            ValueError: If an output is not maps, tokens or rows, one row or map for each image, or a layer
                was not called.
        """
        self.seen.clear()
        whole = None
        if EMBEDDING not in self.columns:
            self.model(pixels)
        else:
            whole = _embedding(self.model, pixels, self.pool, self.channels_last, head=self.with_head)
        found = {}
        for column, name in self.columns.items():
            rows = self.seen.get(column) if name else whole
            if rows is None:
                raise ValueError(f"Layer '{column}' takes no part in the forward pass. Name another.")
            if rows.shape[:-1] != pixels.shape[:1]:
                raise ValueError(
                    f"Layer '{column}' gives {tuple(rows.shape)} for {len(pixels)} images, but features must "
                    "be (n, D). Name a layer with one output for each image."
                )
            found[column] = rows
        self.seen.clear()
        return found

    def _see(self, column: str, module: nn.Module, args: Any, output: Any) -> None:
        # At once: activations and residual sums may be written over the very same tensor.
        self.seen[column] = pool_output(output, self.pool, channels_last=self.channels_last)


def _embedding(
    model: nn.Module, pixels: torch.Tensor, pool: str, channels_last: bool, *, head: bool
) -> torch.Tensor:
    """What comes before any classifier; `head` runs the classifier too, for the hooks in it."""
    own_head: Callable[..., torch.Tensor] | None = getattr(model, "forward_head", None)
    if pool != "avg":
        maps = model.forward_features(pixels)
        if head and own_head:
            own_head(maps)
        return pool_output(maps, pool, channels_last=channels_last)
    if getattr(model, "num_classes", 0) and own_head:
        maps = model.forward_features(pixels)
        features = own_head(maps, pre_logits=True)
        if head:
            own_head(maps)
    else:
        features = model(pixels)
    if not isinstance(features, torch.Tensor) or features.shape[:-1] != pixels.shape[:1]:
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(
            f"The model gives {shape} for {len(pixels)} images, but features must be (n, D). "
            "Give a model that pools, such as mocohub.load or timm.create_model(..., num_classes=0) return."
        )
    return features.float()
