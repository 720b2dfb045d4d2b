"""The Hub's HTTP interface as functions from a request to an answer, without sockets."""

import base64
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml

from helpers.hub_store import DATE, LFS, Blob, Refusal, Repository

if TYPE_CHECKING:
    from helpers.hub_server import HubServer


@dataclass
class Answer:
    body: Any = b""  # bytes, the Path of a file, or what becomes JSON
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Api:
    """One request. `answer` finds the function for its method and path, or a plain file.

    Attributes:
        path: As sent, still quoted: a branch may have a slash in its name.
        role: "read" or "write", from the token; None without one.
        upload: The request's body.
    """

    hub: "HubServer"
    method: str
    path: str
    query: dict[str, list[str]]
    role: str | None
    upload: Path | None
    name: str = ""  # of the repository, once it is known

    def answer(self) -> Answer:
        for methods, pattern, function in _ROUTES:
            if self.method in methods.split("|") and (match := re.fullmatch(pattern, self.path)):
                named = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                if "id" in named:
                    named["repo"] = self._repository(named.pop("id"))
                return function(self, **named)
        path = unquote(self.path)
        for prefix, folder in self.hub.folders.items():
            file = folder / path.removeprefix(f"{prefix}/")
            if path.startswith(f"{prefix}/") and file.is_file():
                stat = file.stat()
                etag = f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'
                return Answer(file, headers={"ETag": etag, "Accept-Ranges": "bytes"})
        raise Refusal(404, f"Nothing at {path}")

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.role):
            raise Refusal(404 if self.role else 401, "Repository not found", "RepoNotFound")
        self.name = name
        return repository

    def _must_write(self) -> None:
        if not self.role:
            raise Refusal(401, "Invalid username or password.")
        if self.role != "write":
            raise Refusal(403, "You don't have the rights to do this with this token")

    def _json(self) -> Any:
        try:
            return json.loads(self.upload.read_bytes() if self.upload else b"{}")
        except ValueError as error:
            raise Refusal(400, f"The body is not JSON: {error}") from None

    def _whoami(self) -> Answer:
        if not self.role:
            raise Refusal(401, "Invalid username or password.")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self.role}}
        return Answer({"type": "user", "name": "tester", "fullname": "Tester", "orgs": [], "auth": auth})

    def _create(self) -> Answer:
        self._must_write()
        asked = self._json()
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.create(name, private=private)
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        return Answer(
            url | {"error": "You already created this model repo"} if known else url, 409 if known else 200
        )

    def _validate_yaml(self) -> Answer:
        errors = card_errors(self._json()["content"])
        answer = {"errors": [{"message": message} for message in errors], "warnings": []}
        return Answer(answer, 400 if errors else 200)

    def _info(self, repo: Repository, rev: str = "main") -> Answer:
        commit = repo.find(rev)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling |= {"size": blob.size, "blobId": blob.git_oid}
                if blob.is_lfs:
                    sibling["lfs"] = {"sha256": blob.sha256, **blob.lfs}
        return Answer(
            {
                "id": self.name,
                "sha": commit.oid,
                "author": self.name.split("/")[0],
                "lastModified": DATE,
                "createdAt": DATE,
                "private": repo.private,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(self, repo: Repository, rev: str, path: str = "") -> Answer:
        files = repo.find(rev).files
        prefix = f"{path}/" if path else ""
        inside = {name: blob for name, blob in sorted(files.items()) if name.startswith(prefix)}
        if path and not inside:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        entries = [_entry(name, blob) for name, blob in inside.items()]
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            deeper = {
                e["path"].removeprefix(prefix).split("/")[0]
                for e in entries
                if "/" in e["path"][len(prefix) :]
            }
            entries = [e for e in entries if "/" not in e["path"][len(prefix) :]]
            entries += [
                {"type": "directory", "path": prefix + n, "oid": "0" * 40, "size": 0} for n in sorted(deeper)
            ]
        return Answer(entries)

    def _paths_info(self, repo: Repository, rev: str) -> Answer:
        text = self.upload.read_text() if self.upload else ""
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        files = repo.find(rev).files
        return Answer([_entry(path, files[path]) for path in paths if path in files])

    def _refs(self, repo: Repository) -> Answer:
        def listing(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in refs.items()]

        refs = {
            "branches": listing("heads", repo.branches),
            "tags": listing("tags", repo.tags),
            "converts": [],
        }
        return Answer(refs)

    def _commits(self, repo: Repository, rev: str) -> Answer:
        facts = {"message": "", "date": DATE, "authors": [{"user": "tester"}]}
        return Answer([{"id": commit.oid, "title": commit.title, **facts} for commit in repo.history(rev)])

    def _preupload(self, repo: Repository, rev: str) -> Answer:
        self._must_write()
        current = repo.find(rev).files
        files = []
        for asked in self._json()["files"]:
            in_lfs = bool(LFS.search(asked["path"])) or asked["size"] > 10 << 20
            oid = current[asked["path"]].etag if asked["path"] in current else None
            mode = {"uploadMode": "lfs" if in_lfs else "regular", "shouldIgnore": False, "oid": oid}
            files.append({"path": asked["path"], **mode})
        return Answer({"files": files})

    def _lfs_batch(self, repo: Repository) -> Answer:
        self._must_write()
        objects = []
        for asked in self._json()["objects"]:
            objects.append({"oid": asked["oid"], "size": asked["size"]})
            if self.hub.storage.find(asked["oid"]):
                continue
            url, part_bytes = (
                f"{self.hub.endpoint}/lfs/{asked['oid']}",
                self.hub.multipart_bytes,
            )
            upload: dict[str, Any] = {"href": url}
            if part_bytes and asked["size"] > part_bytes:
                parts = range(1, -(-asked["size"] // part_bytes) + 1)
                header = {"chunk_size": str(part_bytes), **{f"{n:05d}": f"{url}/part/{n}" for n in parts}}
                upload = {"href": f"{url}/complete", "header": header}
            objects[-1]["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify"}}
        return Answer({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> Answer:
        self._keep(oid, self.upload or self.hub.storage.new_file())
        return Answer()

    def _lfs_part(self, oid: str, number: str) -> Answer:
        assert self.upload
        self.upload.rename(self.hub.storage.folder / f"{oid}.{int(number):05d}")
        return Answer(headers={"ETag": f'"{oid[:8]}-{number}"'})

    def _lfs_complete(self, oid: str) -> Answer:
        whole = self.hub.storage.new_file()
        with open(whole, "wb") as out:
            for part in sorted(self._json()["parts"], key=lambda part: part["partNumber"]):
                file = self.hub.storage.folder / f"{oid}.{part['partNumber']:05d}"
                out.write(file.read_bytes())
                file.unlink()
        self._keep(oid, whole)
        return Answer({})

    def _keep(self, oid: str, file: Path) -> None:
        blob = self.hub.storage.add("x.safetensors", file)
        if blob.sha256 != oid:
            raise Refusal(400, f"The content's SHA-256 is {blob.sha256}, not {oid}")

    def _lfs_verify(self, oid: str) -> Answer:
        self._must_write()
        blob = self.hub.storage.find(oid)
        if blob is None or blob.size != self._json()["size"]:
            raise Refusal(404, f"Object {oid} was not uploaded")
        return Answer({})

    def _xet_token(self, repo: Repository, use: str, rev: str = "main") -> Answer:
        if use == "write":
            self._must_write()
        url, expires = f"local://{self.hub.storage.xet}", int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": url,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(expires),
        }
        return Answer({"casUrl": url, "accessToken": "xet", "exp": expires}, headers=headers)

    def _commit(self, repo: Repository, rev: str) -> Answer:
        """All operations of a commit, or none."""
        self._must_write()
        storage, header, files = self.hub.storage, {}, {}
        assert self.upload
        with repo.lock:
            if rev not in repo.branches:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            files = dict(repo.find(rev).files)
            for line in self.upload.read_bytes().splitlines():
                operation = json.loads(line)
                key, value = operation["key"], operation["value"]
                path = value.get("path", "x").rstrip("/")
                if PurePosixPath(path).is_absolute() or {"..", ".", ".git"} & set(PurePosixPath(path).parts):
                    raise Refusal(400, f"Invalid path: {path}")
                if key == "header":
                    header = value
                elif key == "file":
                    files[path] = storage.add_bytes(path, base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if not (blob := storage.find(value["oid"], value.get("size", 0))):
                        raise Refusal(400, f"LFS object {value['oid']} of {path} was not uploaded")
                    files[path] = blob
                else:
                    doomed = [
                        n for n in files if n == path or (key == "deletedFolder" and n.startswith(f"{path}/"))
                    ]
                    if not doomed:
                        raise Refusal(400, f"{path} does not exist and cannot be deleted")
                    for name in doomed:
                        del files[name]
            parent = header.get("parentCommit")
            if parent and parent != repo.branches[rev]:
                message = "A commit has happened since. Please refresh and try again."
                raise Refusal(412, message)
            commit = repo.commit(header["summary"], files, rev)
        url = f"{self.hub.endpoint}/{self.name}/commit/{commit.oid}"
        return Answer({"success": True, "commitUrl": url, "commitOid": commit.oid})

    def _tag(self, repo: Repository, rev: str) -> Answer:
        self._must_write()
        if self.method == "DELETE":
            if repo.tags.pop(rev, None) is None:
                raise Refusal(404, f"No tag {rev}", "RevisionNotFound")
            return Answer({})
        tag = self._json()["tag"]
        if tag in repo.tags:
            raise Refusal(409, f"Tag {tag} exists already")
        repo.tags[tag] = repo.find(rev).oid
        return Answer({})

    def _branch(self, repo: Repository, rev: str) -> Answer:
        self._must_write()
        if self.method == "DELETE":
            if repo.branches.pop(rev, None) is None:
                raise Refusal(404, f"No branch {rev}", "RevisionNotFound")
            return Answer({})
        if rev in repo.branches:
            raise Refusal(409, f"Branch {rev} exists already")
        repo.branches[rev] = repo.find(self._json().get("startingPoint", "main")).oid
        return Answer({})

    def _delete(self) -> Answer:
        self._must_write()
        asked = self._json()
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        self._repository(name)
        del self.hub.repositories[name]
        return Answer({})

    def _resolve(self, repo: Repository, rev: str, path: str) -> Answer:
        hub, commit = self.hub, repo.find(rev)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(blob.size)}
        if blob.xet_hash:
            url = f"{hub.endpoint}/api/models/{self.name}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{url}>; rel="xet-auth"'}
        if blob.is_lfs and hub.cdn:
            return Answer(b"", 302, {**headers, "Location": f"http://localhost:{hub.port}/cdn/{blob.sha256}"})
        return Answer(hub.storage.content(blob), headers=headers)

    def _cdn(self, oid: str) -> Answer:
        if not (blob := self.hub.storage.find(oid)):
            raise Refusal(403, "No such object")
        return Answer(self.hub.storage.content(blob), headers={"ETag": f'"{oid}"'})


_ID, _REV = r"(?P<id>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
_MODEL = f"/api/models/{_ID}"
_ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", Api._whoami),
    ("POST", "/api/repos/create", Api._create),
    ("DELETE", "/api/repos/delete", Api._delete),
    ("POST", "/api/validate-yaml", Api._validate_yaml),
    ("GET", f"{_MODEL}(?:/revision/{_REV})?", Api._info),
    ("GET", f"{_MODEL}/tree/{_REV}(?:/(?P<path>.+))?", Api._tree),
    ("POST", f"{_MODEL}/paths-info/{_REV}", Api._paths_info),
    ("GET", f"{_MODEL}/refs", Api._refs),
    ("GET", f"{_MODEL}/commits/{_REV}", Api._commits),
    ("POST", f"{_MODEL}/preupload/{_REV}", Api._preupload),
    ("POST", f"{_MODEL}/commit/{_REV}", Api._commit),
    ("POST|DELETE", f"{_MODEL}/tag/{_REV}", Api._tag),
    ("POST|DELETE", f"{_MODEL}/branch/{_REV}", Api._branch),
    ("GET", f"{_MODEL}/xet-(?P<use>read|write)-token/{_REV}", Api._xet_token),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Api._lfs_batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Api._lfs_put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/part/(?P<number>\d+)", Api._lfs_part),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/complete", Api._lfs_complete),
    ("POST", "/lfs/(?P<oid>[0-9a-f]{64})/verify", Api._lfs_verify),
    ("GET|HEAD", f"/{_ID}/resolve/{_REV}/(?P<path>.+)", Api._resolve),
    ("GET|HEAD", "/cdn/(?P<oid>[0-9a-f]{64})", Api._cdn),
]


def card_errors(content: str) -> list[str]:
    """What the Hub would find wrong with a README's metadata; without metadata there is nothing to check."""
    block = re.match(r"---\s*\n(.*?)\n---", content, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return [f"The metadata is not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["The metadata is not a mapping"]
    errors = []
    if metadata.get("license") == "other" and "license_name" not in metadata:
        errors.append('"license_name" is required with license "other"')
    for index in metadata.get("model-index") or []:
        for result in index.get("results", [None]):
            keys = {"task": "type", "dataset": "name"}
            if not isinstance(result, dict) or not all(key in result.get(k, {}) for k, key in keys.items()):
                errors.append('"model-index" needs results with task.type, dataset.name and metrics')
            elif not all({"type", "value"} <= metric.keys() for metric in result.get("metrics", [{}])):
                errors.append('"model-index" needs metrics with type and value')
    return errors


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.git_oid, "size": blob.size}
    if blob.is_lfs:
        entry["lfs"] = blob.lfs
    if blob.xet_hash:
        entry["xetHash"] = blob.xet_hash
    return entry
