"""A frozen model as a function from batches of images to features."""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn

from mocohub.errors import unknown
from mocohub.features.folding import fold, foldable
from mocohub.features.layers import LayerOutputs, find_layers
from mocohub.features.model import evaluating, weight_dtype
from mocohub.features.precision import Rows, fast_bfloat16, largest_error, least_cosine, without_tf32
from mocohub.memory import freed_memory_kept, large_blocks_reused

_log = logging.getLogger(__name__)

_SAMPLE_ROWS = 8  # images on which two ways to compute are compared
_LEAST_COSINE = 0.999  # of bfloat16 and float32 features of an image
_LARGEST_ERROR = 1e-5  # of float32 features: length of the difference / length
_TOO_COARSE = {"float32": (torch.float16, torch.bfloat16), "bfloat16": (torch.float16,)}  # weights, by dtype
_LONG_JOB_S = 1800.0  # compiling takes up to a few minutes and saves about a fifth of the time


class FrozenNetwork:
    """A model in eval mode that gives features, computed in the fastest way that gives the same ones.

    The model itself is left as it is, or is put back on leaving the `with` block: device, modes, weights.

    - Images, and the weights of a copy, are channels_last, unless the model fails on such.
    - Batch norms are folded into the convolutions before them, in a copy, if that moves the float32 features
      of a sample by no more than 1e-5 of their length.
    - bfloat16 autocast, where the processor or card computes in it, if for each image of the sample the
      cosine with the plain float32 features is at least 0.999.
    - torch.compile with frozen weights for long jobs, if it proves faster and gives the same features.

    Which of these hold is chosen from the first batch, and can be handed to other processes.

    >>> with FrozenNetwork(nn.Flatten(), device="cpu") as network:
    ...     network(torch.ones(2, 3, 1, 1))
    {'embedding': tensor([[1., 1., 1.],
            [1., 1., 1.]])}

    Attributes:
        facts: The choice as JSON values, a function of model, arguments and sample (but for "compiled", which
            depends on measured times); empty before `prepare`.
        measured: What the choice took, in seconds and images/s: other numbers each time.
        maps: Names of the columns that are not pooled.
        columns: Width D of each column by its name, of a map all its values; empty before `prepare`.
        shapes: Of the columns that are not vectors: [C, H, W] of maps, [T, D] of tokens; likewise.
        views: Of each image, of which the features are averaged; likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: str | torch.device,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        layers: Sequence[str] = (),
        pool: Literal["avg", "max", "gem", "none"] = "avg",
        flip: bool = False,
        compile: bool | Literal["auto"] = False,
        num_images: int | None = None,
        choice: dict[str, Any] | None = None,
    ) -> None:
        """Keep the arguments, once they are known to fit the model.

        Args:
            model: Any module that takes images (n, C, H, W). One of timm's gives its pooled features from
                before the classifier; what another one returns must be (n, D).
            device: Where to compute.
            dtype: "float32" computes without TF32. "bfloat16" is autocast, however far it is from float32. A
                model whose weights are not float32 computes in their type under "auto".
            layers: Columns to give instead of "embedding"; see `layers.find_layers`.
            pool: How maps and tokens become rows, where `layers` does not say it; see `layers.pool_output`.
                For "embedding", "avg" is the model's own pooling; the others pool what its
                `forward_features` gives. "none" gives maps and tokens as they are.
            flip: Give the mean over the image and its mirror image; not of maps.
            compile: "auto" compiles if `num_images` would take more than half an hour, True always.
            num_images: In the whole job; "auto" does not compile without.
            choice: `facts` of another network of this model and these arguments: do the same, without
                comparing anything.

        Raises:
            ValueError: If an argument is not accepted, or there is no such layer.
        """
        if dtype not in ("auto", "float32", "bfloat16"):
            raise unknown("dtype", dtype, ("auto", "float32", "bfloat16"))
        plain = weight_dtype(model)
        if plain in _TOO_COARSE.get(dtype, ()):
            raise ValueError(
                f"dtype is '{dtype}', but the weights are {plain}. Give model.float(), or dtype='auto', "
                "which computes in their type."
            )
        self._layers = find_layers(model, layers, pool)
        for module, own in self._layers.values():
            if not module and own != "avg" and not hasattr(model, "forward_features"):
                raise ValueError(
                    f"pool='{own}' needs the maps before the model's own pooling, but {type(model).__name__} "
                    "has no forward_features, as timm's models do. Name the layer to pool: layers=[...]."
                )
        self.maps = [column for column, layer in self._layers.items() if layer.pool == "none"]
        if flip and self.maps:
            raise _not_averaged(self.maps, "flip=True")
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile is {compile!r}, but must be True, False or 'auto'.")
        self.facts: dict[str, Any] = {}
        self.measured: dict[str, float] = {}
        self.columns: dict[str, int] = {}
        self.shapes: dict[str, list[int]] = {}
        self.views = 1
        self._layouts: dict[str, bool] = {}
        self._model, self._device, self._dtype = model, torch.device(device), dtype
        self._layout = torch.channels_last
        self._flip, self._compile, self._num_images = flip, compile, num_images
        self._choice = choice
        self._stack = ExitStack()
        self._outputs: LayerOutputs | None = None
        self._compiled: Any = None

    def __enter__(self) -> "FrozenNetwork":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._outputs = self._compiled = None

    def __str__(self) -> str:
        """One line that says what was chosen."""
        facts = self.facts
        if not facts:
            return f"{type(self._model).__name__} on {self._device}"
        cosine = f" (cosine with float32 {facts['cosine']:.4f})" if facts["cosine"] is not None else ""
        folded = f", {facts['folded']} batch norms folded" if facts["folded"] else ""
        compiled = ", compiled" if facts["compiled"] else ""
        return f"{type(self._model).__name__} on {self._device}: {facts['dtype']}{cosine}{folded}{compiled}"

    @property
    def module(self) -> nn.Module:
        """What computes, once `prepare` has chosen it: the model in eval mode, or a copy of it."""
        return self._outputs.model

    def prepare(self, sample: torch.Tensor) -> dict[str, Any]:
        """Choose how to compute, unless that is done; the first call of the network does it by itself.

        Args:
            sample: The first batch (n, C, H, W), or (n, V, C, H, W), preprocessed: of the full size, since
                only batches of its shape use a compiled network.

        Returns:
            The `facts`.

        Raises:
            ValueError: If the model does not give (n, D), or a layer nothing that can be pooled; or if maps
                are asked for of images with several views.
            RuntimeError: If compile=True cannot be met, or the model fails on the sample.
        """
        if self.columns:
            return self.facts
        start = time.perf_counter()
        for name, module in self._model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                _log.warning("Batch norm '%s' has no statistics: rows depend on their batch.", name)
                break
        if self._device.type == "cpu":
            self._stack.enter_context(freed_memory_kept())
        rows = sample[:_SAMPLE_ROWS]
        if sample.ndim == 5:
            self.views = sample.shape[1]
            rows, sample = rows[:, 0], sample.flatten(0, 1)  # one view of each of several images
            if self.maps:
                raise _not_averaged(self.maps, f"{self.views} views of an image")
        self._plain = str(weight_dtype(self._model)).removeprefix("torch.")
        modules = [layer.module for layer in self._layers.values()]
        pairs = foldable(self._model, keep=modules) if self._plain == "float32" else []
        self.facts = {"dtype": self._plain, "folded": 0, "cosine": None, "compiled": None}
        for layout in (torch.channels_last, torch.contiguous_format):  # not all bear the first: x.view(n, -1)
            self._layout = layout
            network = self._copied() if pairs and layout is torch.channels_last else None
            if network is None:
                pairs, network = [], self._stack.enter_context(evaluating(self._model, self._device))
            self._use(network)
            try:
                reference = self._forward(self._outputs, rows)
                break
            except (ValueError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # a network that is not ours may raise anything
                failure = error
        else:
            raise RuntimeError(
                f"The model fails on the first images, {tuple(rows.shape)} once preprocessed: "
                f"{type(failure).__name__}: {str(failure).rstrip('.')}. If it needs others, give "
                "transform=..."
            ) from failure
        if self._choice is None:
            self._choose_folding(network, pairs, rows, reference)
            self._choose_dtype(rows, reference)
            if self._compile is True or (self._compile == "auto" and self._is_long_job(sample)):
                self._choose_compiled(sample)
        else:
            self.facts = dict(self._choice)
            self._fold(network, pairs if self.facts["folded"] else [])
            self._compiled = self._frozen_and_compiled() if self.facts["compiled"] else None
        self.columns = {name: math.prod(values.shape[1:]) for name, values in reference.items()}
        self.shapes = {name: [*values.shape[1:]] for name, values in reference.items() if values.ndim > 2}
        self.measured["prepare_s"] = time.perf_counter() - start
        return self.facts

    def __call__(self, pixels: torch.Tensor) -> Rows:
        """Return the rows (n, D) of each column, or its maps, float32 on the CPU.

        Args:
            pixels: Preprocessed images (n, C, H, W); or several views of each, (n, V, C, H, W), over whose
                features the mean is taken.

        Raises:
            ValueError: As `prepare`.
        """
        return self.begin(pixels)()

    @torch.no_grad()  # not inference_mode: a model may keep what it makes, for training later
    def begin(self, pixels: torch.Tensor) -> Callable[[], Rows]:
        """Begin what calling the network does, and return what waits for its rows.

        On a card the copy of the rows is queued right behind their forward pass, so that another batch may be
        begun before these rows are waited for, and the card has work while they are written.
        """
        self.prepare(pixels)
        images = pixels
        if pixels.ndim == 5:
            if self.maps:
                raise _not_averaged(self.maps, f"{pixels.shape[1]} views of an image")
            images = pixels.flatten(0, 1)
        whole = self._compiled is not None and list(images.shape) == self.facts["compiled"]
        forward = self._compiled if whole else self._outputs
        rows = self._forward(forward, images)
        if self._flip:
            mirrored = self._forward(forward, images.flip(-1))
            rows = {name: (values + mirrored[name]) / 2 for name, values in rows.items()}
        if pixels.ndim == 5:
            rows = {name: values.unflatten(0, pixels.shape[:2]).mean(1) for name, values in rows.items()}
        is_cuda = self._device.type == "cuda"
        rows = {name: values.to("cpu", non_blocking=is_cuda) for name, values in rows.items()}
        copied = torch.cuda.current_stream(self._device).record_event() if is_cuda else None

        def wait() -> Rows:
            if copied is not None:
                copied.synchronize()
            return rows

        return wait

    @torch.no_grad()
    def _forward(self, network: Any, pixels: torch.Tensor) -> Rows:
        plain = weight_dtype(self._model)
        autocast = self.facts["dtype"] == "bfloat16" and plain != torch.bfloat16
        with (
            large_blocks_reused() if self._device.type == "cpu" else nullcontext(),
            without_tf32(self._device),
            torch.autocast(self._device.type, torch.bfloat16, enabled=autocast),
            _room_for(pixels, self._device),
        ):
            pixels = pixels.to(self._device, plain, non_blocking=True, memory_format=self._layout)
            return network(pixels)

    def _use(self, network: nn.Module) -> None:
        if self._outputs is not None:
            self._outputs.close()
        self._outputs = LayerOutputs(network, self._layers, self._layouts)
        self._stack.callback(self._outputs.close)

    def _copied(self) -> nn.Module | None:
        """Return a copy in eval mode on the device, with channels_last weights; None if there can be none."""
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._model.modules()):
            return None  # the copied hooks would tell copies of what they tell
        try:
            network = copy.deepcopy(self._model)
        except Exception as error:  # locks, files, tensors with a history
            _log.info("The model cannot be copied, hence its batch norms not be folded: %s", error)
            return None
        network.requires_grad_(False).eval().to(self._device)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
        return network

    def _fold(self, network: nn.Module, pairs: list[tuple[str, str]]) -> None:
        fold(network, pairs)
        self._use(network)  # hooks of batch norms went with them
        self.facts["folded"] = len(pairs)

    def _choose_folding(
        self, copied: nn.Module, pairs: list[tuple[str, str]], rows: torch.Tensor, reference: Rows
    ) -> None:
        if not pairs:
            return
        self._fold(copied, pairs)
        try:
            problem = largest_error(self._forward(self._outputs, rows), reference)
            if problem <= _LARGEST_ERROR:
                return
        except Exception as error:  # whatever a forward pass makes of its batch norms
            problem = error
        _log.info("Batch norms are not folded, because of %s in the features of the first images.", problem)
        self._use(self._copied())
        self.facts["folded"] = 0

    def _choose_dtype(self, rows: torch.Tensor, reference: Rows) -> None:
        if self._dtype == "auto" and not (self._plain == "float32" and fast_bfloat16(self._device)):
            return
        if self._dtype == "float32" or self._plain == "bfloat16":
            return
        self.facts["dtype"] = "bfloat16"
        cosine = least_cosine(self._forward(self._outputs, rows), reference)
        if self._dtype == "auto" and cosine < _LEAST_COSINE:
            _log.info("float32, because bfloat16 features have a cosine of only %.4f with them.", cosine)
            self.facts["dtype"] = self._plain
        else:
            self.facts["cosine"] = math.floor(cosine * 10_000) / 10_000

    def _is_long_job(self, sample: torch.Tensor) -> bool:
        """Whether a few images say so, and then the whole batch too: alone, few are slower than many."""
        for rows in (sample[:_SAMPLE_ROWS], sample):
            self.measured["images_per_s"] = len(rows) / self._seconds(self._outputs, rows)
            if (self._num_images or 0) / self.measured["images_per_s"] < _LONG_JOB_S:
                return False
        return True

    def _frozen_and_compiled(self) -> Any:
        return torch.compile(self._outputs, dynamic=False, options={"freezing": True})

    def _choose_compiled(self, sample: torch.Tensor) -> None:
        """Compile for the shape of the sample; without compile=True, only keep what is right and faster."""
        start = time.perf_counter()
        compiled = self._frozen_and_compiled()
        try:
            found = self._forward(compiled, sample)
            self.measured["compile_s"] = time.perf_counter() - start
            expected = self._forward(self._outputs, sample)
            if self.facts["dtype"] == "bfloat16":
                agrees, problem = least_cosine(found, expected) >= _LEAST_COSINE, "its features differ"
            else:
                agrees, problem = largest_error(found, expected) <= _LARGEST_ERROR, "its features differ"
        except Exception as error:  # no compiler, or whatever the compiler does not know
            agrees, problem = False, str(error).partition("\n")[0]
        if agrees and self._compile == "auto":
            eager, fast = (min(self._seconds(n, sample) for _ in range(2)) for n in (self._outputs, compiled))
            self.measured["compiled_speedup"] = eager / fast
            agrees, problem = fast < eager, "it is not faster"
        if agrees:
            self._compiled = compiled
            self.facts["compiled"] = list(sample.shape)
        elif self._compile is True:
            raise RuntimeError(f"compile=True cannot be met: {problem}. Use compile='auto' or False.")
        else:
            _log.info("The network is not compiled: %s.", problem)

    def _seconds(self, network: Any, pixels: torch.Tensor) -> float:
        start = time.perf_counter()
        for values in self._forward(network, pixels).values():
            values.cpu()  # waits for a card
        return time.perf_counter() - start


@contextmanager
def _room_for(pixels: torch.Tensor, device: torch.device) -> Iterator[None]:
    """Say how much it was that a card had no room for."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(  # a RuntimeError
            f"{len(pixels)} images of {' x '.join(map(str, pixels.shape[1:]))} at a time are too many for "
            f"{device}: {str(error).partition('. ')[0]}. Lower the batch size."
        ) from error


def _not_averaged(columns: list[str], what: str) -> ValueError:
    return ValueError(
        f"Maps are not averaged, since positions of two views are not the same place: pool='none' of "
        f"{', '.join(columns)} does not go with {what}. Pool them, or give one view."
    )
