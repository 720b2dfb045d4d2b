"""Open checkpoint files of strangers: the only place where a pickle is read, and nothing in one ever runs.

torch's restricted unpickler makes tensors, numbers and containers. Trainers also save objects of classes that
we neither have nor want; those known to be harmless become empty stand-ins, all others are refused.
"""

import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open


def open_checkpoint(path: Path) -> Any:
    """Return what a file of torch.save, in any of its formats, or of safetensors holds.

    Objects of the trainers' own classes come out as stand-ins without content.

    Raises:
        ValueError: If the file is damaged, of another format, or names a function or class not known to be
            harmless.
        RuntimeError: If this torch cannot open pickles safely.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"'{path}' is empty.")
    is_pickle = path.suffix != ".safetensors" and start[8:] != b"{"
    if is_pickle and torch.__version__ < (2, 10):
        raise RuntimeError(
            f"torch {torch.__version__} may run what is in '{path}' (CVE-2026-24747). Install torch 2.10 or "
            "later, or give a safetensors file."
        )
    try:
        if not is_pickle:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise zipfile.BadZipFile  # torch.save does not compress: whoever does wants memory
        with torch.serialization.safe_globals(_stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except SafetensorError as error:
        raise ValueError(f"'{path}' is no safetensors file, or it is damaged: {error}") from None
    except Exception as error:  # torch lets out whatever its parsers meet in a file that is none of its own
        # `from None`, since torch's text advises weights_only=False, which would run the code.
        found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            raise ValueError(
                f"'{path}' is refused: it is a pickle that names {found[1].rstrip('.')}, so to open it could "
                "run code. Nothing was run. Ask its author for the tensors alone, as safetensors, or have "
                "the state_dict saved by itself where it was trained: torch.save(model.state_dict(), FILE)."
            ) from None
        raise ValueError(
            f"'{path}' is not a file torch.save wrote, or it is damaged ({type(error).__name__}). Fetch it "
            "again; accepted are files of torch.save and of safetensors."
        ) from None


def checksums(path: Path) -> dict[str, str]:
    """MD5, by which the authors name their files, and SHA-256, both from one pass."""
    digests = {"md5": hashlib.md5(usedforsecurity=False), "sha256": hashlib.sha256()}
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            for digest in digests.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in digests.items()}


class _Object:
    """Stands in for an object of another project's class; whatever it is given, it forgets."""

    def __new__(cls, *args: Any) -> "_Object":
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict:
    """Stands in for a subclass of dict: making one makes a plain dict."""

    def __new__(cls, *args: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


# What these projects' trainers save besides tensors and numbers. The classes themselves are never imported.
_OBJECTS = """
    argparse.Namespace typing.Any pathlib.Path pathlib.PosixPath pathlib.WindowsPath
    builtins.dict builtins.list builtins.tuple builtins.str builtins.int builtins.float builtins.bool
    numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct
    numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct
    mmengine.logging.history_buffer.HistoryBuffer
    omegaconf.dictconfig.DictConfig omegaconf.listconfig.ListConfig
    omegaconf.base.Metadata omegaconf.base.ContainerMetadata
    omegaconf.nodes.AnyNode omegaconf.nodes.BooleanNode omegaconf.nodes.FloatNode
    omegaconf.nodes.IntegerNode omegaconf.nodes.StringNode omegaconf.nodes.PathNode
""".split()
_DICTS = """
    collections.defaultdict vissl.config.attr_dict.AttrDict vissl.utils.hydra_config.AttrDict
    pytorch_lightning.utilities.parsing.AttributeDict lightning.pytorch.utilities.parsing.AttributeDict
    lightning_fabric.utilities.data.AttributeDict lightning.fabric.utilities.data.AttributeDict
""".split()


def _stand_ins() -> list[tuple[type, str]]:
    return [(_Object, name) for name in _OBJECTS] + [(_Dict, name) for name in _DICTS]
