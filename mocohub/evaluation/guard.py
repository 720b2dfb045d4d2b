"""The proof that a frozen backbone stayed frozen, bit for bit, batch-norm statistics included."""

import hashlib

import torch
from torch import nn

from mocohub import distributed


class Guard:
    """Remembers every tensor of some modules, by its SHA-256.

    The authors of MoCo check the same after the first epoch: a batch norm in training mode changes its
    statistics though it receives no gradient, and they are part of the model (facebookresearch/moco,
    main_lincls.py).

    >>> norm = nn.BatchNorm1d(2).eval()
    >>> guard = Guard({"norm": norm})
    >>> _ = norm.train()(torch.ones(3, 2))
    >>> guard.check()
    Traceback (most recent call last):
    RuntimeError: The backbone is not frozen: norm.running_mean has changed (3 tensors in all). ...
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """Remember `modules` as they are; names are for the message, may be empty."""
        self._modules = modules
        self._before = self._digests()

    def check(self) -> None:
        """Compare with what was. All ranks must call this.

        Raises:
            RuntimeError: If one bit differs on some rank; the message names the first tensor.
        """
        now = self._digests()
        changed = [name for name in self._before | now if self._before.get(name) != now.get(name)]
        for names in distributed.gather_objects(changed):
            if names:
                raise RuntimeError(
                    f"The backbone is not frozen: {names[0]} has changed ({len(names)} tensors in all). A "
                    "number from here would not be of the model that was given. Its forward pass must not "
                    "change parameters or buffers in eval mode."
                )

    def _digests(self) -> dict[str, str]:
        return {
            f"{prefix}.{name}".lstrip("."): _digest(tensor)
            for prefix, module in self._modules.items()
            # state_dict alone would pass over buffers that are not saved.
            for name, tensor in (module.state_dict() | dict(module.named_buffers())).items()
            if isinstance(tensor, torch.Tensor)
        }


def _digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()
