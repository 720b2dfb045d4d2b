"""Put a model folder on the Hub in one commit, and prove that what is there is what was meant.

The folder is verified before anything is sent. All files go into one commit upon the one that was looked at,
so whenever this ends early the repository is as before or as wanted, and to run it again is right. The commit
is then verified from the Hub by another process with an empty cache; only after that it gets its tag.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, httpx, validate_repo_id

import mocohub
from mocohub.files import git_sha1, read_json, sha256
from mocohub.hub import cards
from mocohub.hub.encoders import newest_checkpoint
from mocohub.hub.fetch import snapshot
from mocohub.hub.verify import STATE_FILES, STATE_FOLDER, check_folder, check_training_state, hub_files
from mocohub.hub.web import patiently

_LOG = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REFERENCE = re.compile(r"\w(?!.*(\.\.|//|\.lock$))[\w./-]*(?<![./])")
_VERIFY = """
import sys
from mocohub.hub.verify import verify
checks = verify(sys.argv[1], revision=sys.argv[2])
print(*(check for check in checks if not check.ok), sep="\\n")
sys.exit(not all(check.ok for check in checks))
"""


@dataclass(frozen=True)
class Published:
    """What is on the Hub now, verified from there."""

    repo: str
    commit: str
    changed: tuple[str, ...]  # paths that the commit added, replaced or removed; none if there was no need
    url: str

    def __str__(self) -> str:
        what = ", ".join(self.changed) if self.changed else "nothing had changed"
        return (
            f"{self.url}\n{what}\n"
            f"verified from the Hub: mocohub.load('{self.repo}', revision='{self.commit}')"
        )


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    training_state: str | Path | None = None,
    message: str | None = None,
) -> Published:
    """Publish an exported folder. If the repository has all of it already, nothing is committed.

    The card is rendered again so that its snippets name the repository, unless somebody edited it. A training
    state that is there stays as long as the weights do not change.

    Args:
        folder: What `export` wrote.
        repo: org/name on the Hub; made if it does not exist.
        private: Whether a new repository shall be private; one that exists must be so already.
        revision: Branch to commit to, made from main if it does not exist; main if None.
        tag: Name of this commit, for instance v1.0.
        training_state: Run (its newest checkpoint) or checkpoint that the folder was exported from; its full
            state goes to training-state/ in the same commit, and `mocohub pretrain --init` goes on from it.
        message: Of the commit.

    Raises:
        ValueError: If the folder fails a check, the training state is not of its encoder, the repository
            holds another model or something else or is public, a name cannot be one on the Hub, or the tag
            is taken.
        FileNotFoundError: If the folder or the training state does not exist.
        PermissionError: If the Hub does not let you write there.
        ConnectionError: If it cannot be reached or goes on failing.
        RuntimeError: If somebody else commits at the same time, or the published model is not the folder's.
    """
    folder = Path(folder)
    _check_names(repo, revision, tag)
    files = _folder_files(folder, repo)
    manifest = read_json(folder / "mocohub.json")
    if training_state is None and (folder / STATE_FOLDER).is_dir():
        training_state = folder / STATE_FOLDER
    if training_state is not None:
        files |= _state_files(Path(training_state), folder, manifest)
    api = HfApi(library_name="mocohub", library_version=mocohub.__version__)
    with _writing(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not patiently(lambda: api.model_info(repo), constants.ENDPOINT, f"'{repo}'").private:
        raise ValueError(
            f"'{repo}' is public. Make it private on {constants.ENDPOINT}/{repo}/settings, or omit private."
        )
    branch = revision or constants.DEFAULT_REVISION
    head, tags = _head(api, repo, branch)
    tree = hub_files(api, repo, head)
    _refuse_other(repo, head, tree, manifest)
    operations = _operations(files, tree)
    if tag in tags and (operations or tags[tag] != head):
        raise ValueError(
            f"The tag '{tag}' of '{repo}' already names commit {tags[tag]}, and people may rely on that. "
            "Give another tag."
        )
    changed = tuple(operation.path_in_repo for operation in operations)
    commit = head
    if operations:
        text = message or f"Publish {manifest['name']} with mocohub {mocohub.__version__}"
        with _writing(repo):
            commit = api.create_commit(
                repo, operations, commit_message=text, revision=branch, parent_commit=head
            ).oid
    _verify_elsewhere(repo, commit)
    if tag and tag not in tags:
        with _writing(repo):
            api.create_tag(repo, tag=tag, revision=commit, exist_ok=True)
    return Published(repo, commit, changed, f"{constants.ENDPOINT}/{repo}/tree/{tag or commit}")


def _check_names(repo: str, revision: str | None, tag: str | None) -> None:
    """Refuse what the Hub would refuse later, or what it would take for something else."""
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise ValueError(f"'{repo}' cannot be a repository on the Hub. Give org/name, or you/name.") from None
    for kind, name in (("branch", revision), ("tag", tag)):
        if name is not None and (not _REFERENCE.fullmatch(name) or _COMMIT.fullmatch(name)):
            raise ValueError(f"'{name}' cannot be a {kind}. Give a name such as 'v1.0'.")
    if is_offline_mode():
        raise ValueError("To publish takes a network, and HF_HUB_OFFLINE is set. Unset it.")


def _folder_files(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """Return the folder's files by path in the repository, whose name manifest and card then state."""
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder. Write one with `mocohub export`.")
    if bad := [str(check) for check in check_folder(folder) if not check.ok]:
        raise ValueError(
            f"'{folder}' is not published, since `mocohub verify` finds it wrong:\n"
            + "\n".join(bad)
            + "\nExport it again, or remove what does not belong there."
        )
    manifest = read_json(folder / "mocohub.json")
    card = (folder / "README.md").read_text(encoding="utf-8")
    published = manifest | {"repo": repo}
    if card == cards.render(manifest):
        card = cards.render(published)
    else:
        _LOG.info("The card of '%s' was edited: it is published as it is.", folder)
    text = json.dumps(published, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return {
        "README.md": card.encode(),
        "mocohub.json": text.encode(),
        **{name: folder / name for name in ("config.json", "model.safetensors")},
    }


def _state_files(source: Path, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Path | bytes]:
    """Return the files of the checkpoint that `source` is, or is a run of, by path in the repository."""
    if not source.is_dir():
        raise FileNotFoundError(f"training_state='{source}' is no folder. Give a run or a checkpoint.")
    state = newest_checkpoint(source) if (source / "run.json").is_file() else source
    if state is None or not (state / "state.json").is_file():
        raise ValueError(f"training_state='{source}' holds no checkpoint. Give a run or a checkpoint.")
    try:
        check_training_state(state, folder, manifest)
    except ValueError as error:
        raise ValueError(f"{error}. Give the checkpoint that '{folder}' was exported from.") from error
    files: dict[str, Path | bytes] = {name: state / Path(name).name for name in STATE_FILES}
    sums = f"{STATE_FOLDER}/SHA256SUMS"
    if not (state / "SHA256SUMS").is_file():  # of a run before there was one
        names = ("state.json", "state.safetensors")
        files[sums] = "".join(f"{sha256(state / name)}  {name}\n" for name in names).encode()
    return files


def _head(api: HfApi, repo: str, branch: str) -> tuple[str, dict[str, str]]:
    """Return the commit a branch is at, once it is made, and the commits of all tags."""
    refs = patiently(lambda: api.list_repo_refs(repo), constants.ENDPOINT, f"the branches of '{repo}'")
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if branch not in heads:
        with _writing(repo):
            api.create_branch(repo, branch=branch, exist_ok=True)
        heads[branch] = heads[constants.DEFAULT_REVISION]
    return heads[branch], {ref.name: ref.target_commit for ref in refs.tags}


def _refuse_other(repo: str, head: str, tree: Mapping[str, RepoFile], manifest: Mapping[str, Any]) -> None:
    """Raise ValueError if the repository holds anything but a version of this model."""
    remedy = f"Choose another --repo or a branch (--revision), or empty {constants.ENDPOINT}/{repo} first."
    if not (names := sorted(tree.keys() - {".gitattributes", "README.md"})):
        return
    if "mocohub.json" not in tree:
        raise ValueError(
            f"'{repo}' holds something else: {', '.join(names[:5])}, and no mocohub.json. {remedy}"
        )
    try:
        theirs = read_json(snapshot(repo, revision=head, patterns=["mocohub.json"]) / "mocohub.json")
    except ValueError as error:
        raise ValueError(f"'{repo}' has a mocohub.json that is none of ours: {error} {remedy}") from error
    for name in ("format", "name", "architecture", "model_args", "encoder"):
        if theirs.get(name) != manifest[name]:
            raise ValueError(
                f"'{repo}' holds another model: its {name} is {theirs.get(name)!r}, and the folder's is "
                f"{manifest[name]!r}. {remedy}"
            )


def _operations(
    files: Mapping[str, Path | bytes], tree: Mapping[str, RepoFile]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return what makes `tree` hold exactly `files` as far as the files are ours; none if it does."""
    changed = [name for name, content in files.items() if name not in tree or not _same(content, tree[name])]
    gone = []
    if "model.safetensors" in changed:  # a training state of other weights
        gone = [name for name in STATE_FILES if name in tree and name not in files]
    additions = [CommitOperationAdd(name, files[name]) for name in changed]
    return [*additions, *(CommitOperationDelete(name) for name in gone)]


def _same(content: Path | bytes, entry: RepoFile) -> bool:
    if entry.lfs:
        local = sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        return local == entry.lfs.sha256
    data = content if isinstance(content, bytes) else content.read_bytes()
    return git_sha1(data) == entry.blob_id


@contextmanager
def _writing(repo: str) -> Iterator[None]:
    """Turn what the Hub answers to a request to write into an error that says what to do."""
    try:
        yield
    except (HfHubHTTPError, httpx.HTTPError, RuntimeError) as failed:
        # The client wraps what happened to an upload.
        error = failed if isinstance(failed, (HfHubHTTPError, httpx.HTTPError)) else failed.__cause__
        if not isinstance(error, (HfHubHTTPError, httpx.HTTPError)):
            raise
        host, response = constants.ENDPOINT, getattr(error, "response", None)
        status = response.status_code if response is not None else None
        if status in (401, 403):
            raise PermissionError(
                f"{host} does not let you write to '{repo}' ({status}). Log in with `hf auth login` and a "
                "token that may write there; `hf auth whoami` says who you are."
            ) from error
        if status == 412:
            raise RuntimeError(
                f"Somebody else has committed to '{repo}' meanwhile, so nothing of this was. Run it again."
            ) from error
        what = f"answered {status}" if status else f"did not answer ({type(error).__name__})"
        raise ConnectionError(
            f"{host} {what} when asked to write to '{repo}': {error}. It holds all of this commit or nothing "
            "of it. Run it again."
        ) from error


def _verify_elsewhere(repo: str, commit: str) -> None:
    """Verify a commit from the Hub, in a process that has nothing of this one and an empty cache."""
    with tempfile.TemporaryDirectory(prefix="mocohub-publish-") as cache:
        caches = {name: cache for name in ("HF_HUB_CACHE", "HF_XET_CACHE", "MOCOHUB_CACHE")}
        environment = {**os.environ, **caches, "HF_ENDPOINT": constants.ENDPOINT}
        command = [sys.executable, "-c", _VERIFY, repo, commit]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]
        raise RuntimeError(
            f"Commit {commit} is on {constants.ENDPOINT}/{repo}, but it cannot be verified from there:\n"
            f"{said}\nIf that is the network, run it again: what is there already is only verified."
        )
