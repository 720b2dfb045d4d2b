"""Requests that are repeated while the fault may pass, and errors that say which host did not give what."""

import hashlib
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RevisionNotFoundError
from huggingface_hub.utils import get_session, httpx
from tqdm import tqdm

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

TIMEOUT_S = 10.0  # of one answer
PATIENCE_S = 30.0  # no attempt begins later; repetitions of the Hub's client within one take up to 23 s more
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


def download(url: str, folder: Path, *, md5: str) -> Path:
    """Fetch one file into `folder`, go on where the connection is cut, and check its MD5.

    Args:
        url: Of the file; its last part names the file.
        folder: An existing folder.
        md5: What the MD5 must begin with.

    Raises:
        FileNotFoundError: If the host has no such file.
        PermissionError: If it refuses the file.
        ConnectionError: If it cannot be reached or goes on failing.
        RuntimeError: If the file has another MD5, twice. It is not kept.
    """
    file = folder / url.rsplit("/", 1)[1]
    for _ in range(2):
        found = _stream(url, file)
        if found.startswith(md5):
            return file
        file.unlink()
        _LOG.warning("%s arrived with MD5 %s instead of %s...", url, found, md5)
    raise RuntimeError(
        f"{url} arrived twice with MD5 {found}, and its authors state {md5}...: it is another file, or "
        "something on the way changes it. Nothing of it was kept. Try another network."
    )


def patiently(attempt: Callable[[], _T], host: str, what: str, progress: Callable[[], int] = lambda: 0) -> _T:
    """Return what `attempt` returns; repeat it while the fault may pass, for at most `PATIENCE_S`.

    Args:
        attempt: A request, by the Hub's client or its session.
        host: For the error.
        what: Is asked for, for the error.
        progress: A number that grows as long as repeating pays.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: As `download`.
        ValueError: If the Hub has no such revision.
    """
    begun, pause_s, reached = time.monotonic(), 0.5, progress()
    while True:
        try:
            return attempt()
        except Exception as failed:
            error = failed
            if isinstance(failed, (EntryNotFoundError, ValueError)) and failed.__cause__:
                error = failed.__cause__  # the client wraps what happened into what it could not do
            if progress() > reached:
                begun, pause_s, reached = time.monotonic(), 0.5, progress()
            wait_s = _wait_s(error, pause_s)
            if wait_s is None or time.monotonic() + wait_s - begun > PATIENCE_S:
                explained = _explained(error, host, what)
                if explained is None:
                    raise
                raise explained from error
            _LOG.warning("%s: %s failed (%s); trying again in %.1f s.", host, what, error, wait_s)
        time.sleep(wait_s)
        pause_s = min(2 * pause_s, 8.0)


def _wait_s(error: BaseException, pause_s: float) -> float | None:
    """Seconds after which to try again, as the host asks for or `pause_s`; None if trying again is no use."""
    response = getattr(error, "response", None)
    if response is not None and response.status_code in _TRANSIENT:
        asked = response.headers.get("Retry-After", "")
        return float(asked) if asked.isdigit() else pause_s
    if isinstance(error, httpx.TransportError):
        hopeless = (httpx.ConnectError, httpx.ProxyError, httpx.UnsupportedProtocol)
        return None if isinstance(error, hopeless) else pause_s
    # What the Hub's client raises when a file is shorter than announced.
    return pause_s if type(error) is OSError and error.errno is None else None


def _stream(url: str, file: Path) -> str:
    """Write what `url` serves to `file` and return its MD5."""
    md5 = hashlib.md5(usedforsecurity=False)
    with open(file, "wb") as out, tqdm(desc=file.name, unit="B", unit_scale=True, disable=None) as bar:

        def attempt() -> None:
            nonlocal md5
            begun = out.tell()
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begun}-"} if begun else {})
            session = get_session()
            with session.stream(
                "GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
            ) as answer:
                answer.raise_for_status()
                if begun and not answer.headers.get("Content-Range", "").startswith(f"bytes {begun}-"):
                    out.seek(0)  # the host sends all of it again
                    out.truncate()
                    bar.reset()
                    md5 = hashlib.md5(usedforsecurity=False)
                bar.total = out.tell() + int(answer.headers.get("Content-Length", 0)) or None
                for block in answer.iter_bytes():
                    out.write(block)
                    md5.update(block)
                    bar.update(len(block))

        patiently(attempt, re.match(r"\w+://[^/]+", url)[0], file.name, progress=out.tell)
    return md5.hexdigest()


def _explained(error: BaseException, host: str, what: str) -> Exception | None:
    """Return the error that says which host did not give what, and what to do; None for other faults."""
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if isinstance(error, RevisionNotFoundError):
        return ValueError(f"{host} has no {what}. Give a branch, a tag or a full commit, or none.")
    if isinstance(error, GatedRepoError) or status == 403:
        return PermissionError(
            f"{host} refuses {what} ({status}). Log in with `hf auth login` as somebody who may read it; if "
            "it has terms, accept them on its page."
        )
    if status in (401, 404):
        return FileNotFoundError(
            f"{host} has no {what} ({status}). If it is private or gated, log in with `hf auth login`."
        )
    if status is not None and not 300 <= status < 400:
        asked = response.headers.get("Retry-After")
        when = f"in {asked} s" if asked else "later"
        return ConnectionError(f"{host} answered {status} when asked for {what}. Try again {when}.")
    if isinstance(error, httpx.TooManyRedirects):
        return ConnectionError(
            f"{host} sends {what} round in circles (too many redirects). Check HF_ENDPOINT and the proxy."
        )
    if isinstance(error, httpx.HTTPError) or (type(error) is OSError and error.errno is None):
        return ConnectionError(
            f"{host} did not give {what} ({type(error).__name__}: {error}). Check the network, the proxy and "
            "HF_ENDPOINT; offline=True takes what is in the cache."
        )
    return None
