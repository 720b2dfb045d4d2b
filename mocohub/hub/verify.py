"""Check that a model is what its manifest says: every hash, card, config, weights, features of a fixed input.

Nothing here changes or repairs anything, and no file of another format than safetensors, JSON and Markdown is
ever opened. What is wrong is a line of the answer; only what cannot be looked at raises.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import timm
from huggingface_hub import HfApi, RepoFile, constants, is_offline_mode
from safetensors import safe_open

import mocohub
from mocohub.files import damage, git_sha1, read_json
from mocohub.hub.cards import check_metadata
from mocohub.hub.encoders import EXPORT_FORMAT
from mocohub.hub.export import fingerprint, fingerprint_difference
from mocohub.hub.fetch import MODEL_FILES, snapshot
from mocohub.hub.load import load
from mocohub.hub.verified import sha256_once
from mocohub.hub.web import patiently
from mocohub.hub.zoo import ZOO

FOLDER_FILES = (*MODEL_FILES, "README.md")
STATE_FOLDER = "training-state"
STATE_FILES = tuple(f"{STATE_FOLDER}/{name}" for name in ("SHA256SUMS", "state.json", "state.safetensors"))
TOLERANCE = 1e-5  # relative; machines differ by less (see export.fingerprint)

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# What nobody's program runs, and what `hf download` and Git leave beside the files they fetch.
_HARMLESS = re.compile(
    r"\.cache/huggingface/.*|\.git/.*|\.git\w+|(.*/)?(LICENSE|NOTICE)|.*\.(md|txt|png|jpe?g|svg|ya?ml)"
)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str  # what was found, or what is wrong

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':6} {self.name}: {' '.join(self.detail.split())}"


def verify(source: str | Path, *, revision: str | None = None) -> list[Check]:
    """Check a model folder, or what the Hub serves, or offline what its cache holds.

    Of a training state on the Hub only the small files are fetched; the large one is judged by the hash under
    which the Hub stores it.

    Args:
        source: An exported folder, `org/name` or `org/name@revision` on the Hub, or a name of the zoo.
        revision: Branch, tag or commit on the Hub; the default branch if None.

    Returns:
        All checks, failed or not. If one on which others depend fails, those are left out.

    Raises:
        FileNotFoundError: If there is no such folder or repository.
        ValueError: If `source` is a file, or a folder and `revision` is given.
        PermissionError, ConnectionError: If the Hub refuses, or cannot be reached.
    """
    path, name = Path(source).expanduser(), os.fspath(source).removeprefix("hf-hub:")
    model = ZOO.get(name)
    if model and model.bundled:
        path = model.bundled_folder
    if path.exists():
        if revision is not None:
            raise ValueError(
                f"'{source}' is on this disk, and revision={revision!r} is for the Hub. Omit it."
            )
        if not path.is_dir():
            raise ValueError(
                f"'{source}' is a file. What is verified are model folders: `mocohub export` it."
            )
        return check_folder(path)
    repository, _, pinned = name.partition("@")
    if repository in ZOO:
        repository = ZOO[repository].repository
    if not _REPOSITORY.fullmatch(repository):
        raise FileNotFoundError(
            f"'{source}' does not exist on this disk. A model on the Hub is named org/name, and "
            "`mocohub list` names those of the zoo."
        )
    return _check_repository(repository, revision or pinned or None)


def check_folder(folder: Path, names: Iterable[str] | None = None) -> list[Check]:
    """Check a model folder, as far as its files are there.

    Args:
        folder: With files as `mocohub export` writes them.
        names: Of the files that it or its repository should be judged by; all that are in it if None.
    """
    if names is None:
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    checks = [_check("files", _files, sorted(names)), _check("mocohub.json", _manifest, folder)]
    if not checks[-1].ok:
        return checks
    manifest = read_json(folder / "mocohub.json")
    for name, stated in manifest["sha256"].items():
        checks.append(_check(f"SHA-256 of {name}", _hash, folder, name, stated))
    if (folder / "README.md").is_file():
        checks.append(_check("README.md", _card, folder, manifest))
    checks.append(_check("config.json", _config, folder, manifest))
    if all(check.ok for check in checks if check.name not in ("files", "README.md")):
        checks.append(_check("model.safetensors", _weights, folder, manifest))
        checks.append(_check("fingerprint", _features, folder, manifest))
    if (folder / STATE_FOLDER / "state.safetensors").is_file():
        state = folder / STATE_FOLDER
        checks.append(_check(STATE_FOLDER, check_training_state, state, folder, manifest))
    return checks


def check_training_state(state: Path, folder: Path, manifest: Mapping[str, Any]) -> str:
    """Return a line about a checkpoint whose encoder is the one in a model folder, bit by bit.

    Raises:
        ValueError: If it is damaged, or holds another encoder.
    """
    if reason := damage(state, "state.json", "state.safetensors"):
        raise ValueError(f"'{state}' is damaged: {reason}")
    prefix = f"{manifest['encoder']}.backbone."
    with (
        safe_open(state / "state.safetensors", "pt") as full,
        safe_open(folder / "model.safetensors", "pt") as part,
    ):
        names = {name for name in full.keys() if name.startswith(prefix)}
        if names != {prefix + name for name in part.keys()}:
            raise ValueError(f"'{state}' holds another network than '{folder}'")
        for name in sorted(names):
            if not full.get_tensor(name).equal(part.get_tensor(name.removeprefix(prefix))):
                raise ValueError(
                    f"'{state}' is of step {read_json(state / 'state.json').get('step')}, and '{folder}' of "
                    f"step {manifest.get('steps')} or of another run: '{name}' differs"
                )
    return f"step {read_json(state / 'state.json').get('step')}, with this {manifest['encoder']} encoder"


def hub_files(api: HfApi, repository: str, commit: str) -> dict[str, RepoFile]:
    """Return what the Hub lists of a commit, by path."""
    entries = patiently(
        lambda: list(api.list_repo_tree(repository, recursive=True, revision=commit)),
        constants.ENDPOINT,
        f"the list of files of '{repository}'",
    )
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _check_repository(repository: str, revision: str | None) -> list[Check]:
    small = [name for name in STATE_FILES if not name.endswith(".safetensors")]
    try:
        folder = snapshot(repository, revision=revision, patterns=[*FOLDER_FILES, *small])
    except RuntimeError as error:  # a file that arrives wrong twice
        return [Check("download", False, str(error))]
    commit = folder.name
    if is_offline_mode():
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        checks = check_folder(folder, present | {"README.md"})  # `load` fetches no card
        return [Check("commit", True, f"{repository} at {commit}, from the cache"), *checks]
    api = HfApi(library_name="mocohub", library_version=mocohub.__version__)
    tree = hub_files(api, repository, commit)
    checks = [Check("commit", True, f"{repository} at {commit}"), *check_folder(folder, tree)]
    checks.append(_check("hashes on the Hub", _served, folder, tree))
    return checks


def _check(name: str, look: Callable[..., str], *args: Any) -> Check:
    try:
        return Check(name, True, look(*args))
    except Exception as error:  # whatever a parser meets in a damaged or malicious file is that file's fault
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return Check(name, False, text)


def _files(names: list[str]) -> str:
    if missing := [name for name in FOLDER_FILES if name not in names]:
        raise ValueError(f"{', '.join(missing)} missing")
    known = (*FOLDER_FILES, *STATE_FILES)
    unexpected = [name for name in names if name not in known and not _HARMLESS.fullmatch(name)]
    if unexpected:
        more = f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else ""
        raise ValueError(
            f"{', '.join(unexpected[:5])}{more} did not come from mocohub, and may be code. Remove them"
        )
    return f"{len(names)}, none that could hold code"


def _manifest(folder: Path) -> str:
    manifest = read_json(folder / "mocohub.json")
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != EXPORT_FORMAT:
        raise ValueError(f"format {found!r}; this verifies {EXPORT_FORMAT!r}")
    stated = manifest.get("sha256")
    if not isinstance(stated, dict) or not {"model.safetensors", "config.json"} <= stated.keys():
        raise ValueError("states no SHA-256 of model.safetensors and config.json")
    return f"{manifest['name']}, the {manifest['encoder']} encoder, license {manifest['license']}"


def _hash(folder: Path, name: str, stated: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise ValueError("mocohub.json states the hash of a file outside of its folder")
    if (found := sha256_once(folder / name)) != stated:
        raise ValueError(f"{found}, mocohub.json says {stated}")
    return found


def _card(folder: Path, manifest: Mapping[str, Any]) -> str:
    data = check_metadata((folder / "README.md").read_text(encoding="utf-8"))
    if data.license != manifest["license"]:
        raise ValueError(f"license {data.license!r}, mocohub.json says {manifest['license']!r}")
    return f"license {data.license}, {len(data.eval_results or [])} results"


def _config(folder: Path, manifest: Mapping[str, Any]) -> str:
    config = read_json(folder / "config.json")
    for name in ("architecture", "model_args", "num_features"):
        if config.get(name) != manifest[name]:
            raise ValueError(f"{name} is {config.get(name)!r}, mocohub.json says {manifest[name]!r}")
    for name, stated in manifest["preprocessing"].items():
        if (found := config["pretrained_cfg"].get(name)) != stated:
            raise ValueError(f"{name} is {found!r}, mocohub.json says {stated!r}")
    # As a path, so that timm takes its arguments as data: none can name weights to open.
    model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0, device="meta")
    if model.num_features != config["num_features"]:
        raise ValueError(f"num_features is {config['num_features']}, the network has {model.num_features}")
    return f"{config['architecture']}, {model.num_features} features"


def _weights(folder: Path, manifest: Mapping[str, Any]) -> str:
    model = timm.create_model(f"local-dir:{folder}", pretrained=False, num_classes=0, device="meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    if differing := sorted(name for name, _ in wanted.items() ^ found.items()):
        first = differing[0]
        raise ValueError(
            f"{len(set(differing))} tensors are not those of the network in config.json, the first is "
            f"'{first}': {found.get(first)} instead of {wanted.get(first)}"
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters != manifest["num_parameters"]:
        raise ValueError(f"{num_parameters} parameters, mocohub.json says {manifest['num_parameters']}")
    return f"{len(found)} tensors, {num_parameters:,} parameters"


def _features(folder: Path, manifest: Mapping[str, Any]) -> str:
    difference = fingerprint_difference(manifest["fingerprint"], fingerprint(load(folder)))
    if not difference <= TOLERANCE:
        raise ValueError(f"features differ by {difference:.1e} (relative) from those in mocohub.json")
    return f"features differ by {difference:.1e} (relative) from those in mocohub.json"


def _served(folder: Path, tree: Mapping[str, RepoFile]) -> str:
    """Compare what arrived, and what the small files state, with the hashes in the Hub's list of files."""
    for name, entry in tree.items():
        if entry.lfs is None and (folder / name).is_file():
            found = git_sha1((folder / name).read_bytes())
            if found != entry.blob_id:
                raise ValueError(f"{name} arrived with Git's SHA-1 {found}, the Hub lists {entry.blob_id}")
    stated = {"model.safetensors": read_json(folder / "mocohub.json")["sha256"]["model.safetensors"]}
    state = f"{STATE_FOLDER}/state.safetensors"
    if state in tree:
        stated[state] = read_json(folder / STATE_FOLDER / "state.json")["sha256"]["state.safetensors"]
    for name, expected in stated.items():
        listed = tree[name].lfs
        if listed is None or listed.sha256 != expected:
            raise ValueError(f"the Hub has {name} with SHA-256 {listed and listed.sha256}, not {expected}")
    return f"of {len(tree)} files, as listed"
