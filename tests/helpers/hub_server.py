"""A Hub on the loopback: the HTTP protocol of the real one, for download and upload, and faults on demand.

    with HubServer() as server:
        commit = server.add("org/name", folder, "v1.0")  # commit what is in a folder, and tag it
        server.serve("/moco/moco_checkpoints", folder)  # plain files, as the authors' server has them
        server.faults.append(Fault("corrupt", r"/resolve/.*safetensors", times=2))
        subprocess.run(["hf", "download", "org/name"], env=server.environment(home))
        server.requests  # [("GET", "/api/models/org/name/revision/main"), ...]

Clients read their endpoint when they are imported, so they run in processes of their own. Writing needs the
token that `environment` sets (`hf_test`); with `hf_read` the server answers 403, without or with another 401.
Files travel by LFS if the client has HF_HUB_DISABLE_XET=1 (the default of `environment`), else by xet, whose
client library then keeps the content in a folder of ours, without HTTP.
"""

import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.hub_api import Answer, Api
from helpers.hub_store import GITATTRIBUTES, Refusal, Repository, Storage

KINDS = ("status", "close", "close_after", "cut", "short", "corrupt", "stall", "redirect_loop", "wrong_etag")
TOKENS = {"hf_test": "write", "hf_read": "read"}
_BLOCK_BYTES = 1 << 20


@dataclass
class Fault:
    """One way to misbehave, for the requests whose method and path (unquoted, without query) match.

    Args:
        kind: "status": answer `status` and do nothing. "close": hang up without an answer, nothing done.
            "close_after": do what was asked, then hang up. "cut": hang up amid the body. "short": a body and
            a Content-Length one byte too small. "corrupt": one bit of the body flipped. "stall": wait
            `seconds` before anything. "redirect_loop": send the client to the same place.
            "wrong_etag": ETags of another file.
        path: Searched in the request's path as a regular expression.
        method: All if empty.
        times: So often, then never again; math.inf for ever.
        after: Let so many matching requests pass before.
        status, headers: Of the answer, for "status".
        seconds: For "stall"; the server's end ends it too.
        hits: How often it struck.
    """

    kind: str
    path: str = ""
    method: str = ""
    times: float = 1
    after: int = 0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 60.0
    hits: int = 0

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        if self.times <= 0 or self.method not in ("", method) or not re.search(self.path, path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        self.times -= 1
        self.hits += 1
        return True


class HubServer:
    """See the module. `endpoint` goes into HF_ENDPOINT; all attributes may be changed while it runs.

    Args:
        multipart_bytes: LFS files larger than this are uploaded in parts of this size.
        cdn: Send the client to another host name for the content of LFS files, as the real one does.
    """

    def __init__(self, *, multipart_bytes: int | None = None, cdn: bool = False) -> None:
        self.multipart_bytes, self.cdn = multipart_bytes, cdn
        self.repositories: dict[str, Repository] = {}
        self.folders: dict[str, Path] = {}  # prefix of the path -> folder of plain files
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.tokens_seen: list[tuple[str, str | None]] = []  # (host and port, token) of every request
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="hub-")
        self.storage = Storage(Path(self._folder.name))
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()
        if self._server.errors and not any(error):
            raise RuntimeError("The server itself failed") from self._server.errors[0]

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """This process's environment for a client of this server alone, with its caches under `home`."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not re.match(r"HF_|HUGGING|MOCOHUB_|TRANSFORMERS_|XDG_CACHE|.*_proxy$", name, re.IGNORECASE)
        }
        return kept | {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": "hf_test",
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "MOCOHUB_CACHE": str(home / "mocohub"),
            "MOCOHUB_WEIGHTS_URL": self.endpoint,
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            **changes,
        }

    def create(self, repository: str, *, private: bool = False) -> Repository:
        """Make a repository as the Hub does, with .gitattributes in its first commit."""
        created = self.repositories[repository] = Repository(private)
        created.commit(
            "initial commit", {".gitattributes": self.storage.add_bytes(".gitattributes", GITATTRIBUTES)}
        )
        return created

    def add(self, repository: str, folder: Path, *tags: str, private: bool = False) -> str:
        """Commit exactly what is in a folder to main, put tags on it, and return the commit.

        The files are read whenever they are served: leave them alone until the server stops.
        """
        files = {
            str(file.relative_to(folder)): self.storage.add(file.name, file)
            for file in folder.rglob("*")
            if file.is_file()
        }
        target = self.repositories.setdefault(repository, Repository(private))
        commit = target.commit("Upload folder", files)
        target.tags.update(dict.fromkeys(tags, commit.oid))
        return commit.oid

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, for comparison."""
        blobs = self.repositories[repository].find(revision).files
        return {path: self.storage.content(blob).read_bytes() for path, blob in blobs.items()}

    def serve(self, prefix: str, folder: Path) -> None:
        """Serve the files of a folder as they are at PREFIX/NAME."""
        self.folders[prefix.rstrip("/")] = folder

    def fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            return next((fault for fault in self.faults if fault.strikes(method, path)), None)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.errors: list[BaseException | None] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(error := sys.exception(), ConnectionError | TimeoutError):  # those are the client's
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_hub: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def _handle(self) -> None:
        hub, target = self.server_hub, urlsplit(self.path)
        path = unquote(target.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        hub.requests.append((self.command, path))
        hub.tokens_seen.append((self.headers.get("Host", ""), token))
        fault = hub.fault(self.command, path)
        kind = fault.kind if fault else ""
        if (kind == "stall" and hub.stopping.wait(fault.seconds)) or kind == "close":
            self.close_connection = True
            return
        upload = self._receive()  # always, or the next request on this connection would begin amid it
        if kind == "status":
            self._send(Answer({"error": "as ordered"}, fault.status, dict(fault.headers)))
            return
        if kind == "redirect_loop":
            self._send(Answer(b"", 302, {"Location": self.path}))
            return
        try:
            if token and token not in TOKENS:
                raise Refusal(401, "Invalid credentials in Authorization header")
            api = Api(hub, self.command, target.path, parse_qs(target.query), TOKENS.get(token or ""), upload)
            answer = api.answer()
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            answer = Answer({"error": refusal.message}, refusal.status, headers)
        if kind == "close_after":
            self.close_connection = True
        else:
            self._send(answer, kind)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 (the base class's names)

    def _receive(self) -> Path | None:
        """Write the request's body to a file; None if it has none."""
        left = int(self.headers.get("Content-Length", 0))
        chunked = self.headers.get("Transfer-Encoding", "") == "chunked"
        if not (left or chunked):
            return None
        file = self.server_hub.storage.new_file()
        with open(file, "wb") as out:
            while left or chunked:
                if chunked and not left and (line := self.rfile.readline()):  # else the client is gone
                    left = int(line, 16)
                    if not left:
                        self.rfile.readline()
                        break
                if not (block := self.rfile.read(min(left, _BLOCK_BYTES))):
                    raise ConnectionError("The client hung up amid its upload.")
                out.write(block)
                left -= len(block)
                if chunked and not left:
                    self.rfile.readline()
        return file

    def _send(self, answer: Answer, kind: str = "") -> None:
        headers, body = dict(answer.headers), answer.body
        if not isinstance(body, bytes | Path):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        start, stop, status = 0, size, answer.status
        if status == 200 and (asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = max(start, min(size, int(last) + 1) if first and last else size)
            status = 206 if start < stop else 416
            headers["Content-Range"] = f"bytes {f'{start}-{stop - 1}' if start < stop else '*'}/{size}"
        if kind == "wrong_etag":
            headers |= {name: f'"{"0" * 64}"' for name in headers if "etag" in name.lower()}
        if kind == "short":
            stop = max(start, stop - 1)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(stop - start)}.items():
            self.send_header(name, value)
        if kind == "cut":
            self.close_connection = True
        self.end_headers()
        if self.command == "HEAD":
            return
        flipped = (start + stop) // 2 if kind == "corrupt" and stop > start else -1
        for at, block in _blocks(body, start, (start + stop) // 2 if kind == "cut" else stop):
            if at <= flipped < at + len(block):
                block = block[: flipped - at] + bytes([block[flipped - at] ^ 1]) + block[flipped - at + 1 :]
            self.wfile.write(block)


def _blocks(body: bytes | Path, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a part of a body."""
    if isinstance(body, bytes):
        yield start, body[start:stop]
        return
    with open(body, "rb") as file:
        file.seek(start)
        while start < stop and (block := file.read(min(_BLOCK_BYTES, stop - start))):
            yield start, block
            start += len(block)
