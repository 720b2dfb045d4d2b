"""Calls of ours in a process whose Hub is a HubServer: the Hub's client reads its settings when imported."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any
from unittest.mock import patch


class HubProcess:
    """One process that answers calls, one after the other; a context manager.

    Args:
        environment: Of the process, as `HubServer.environment` makes it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with patch.dict(os.environ, environment, clear=True):
            self._pool.submit(os.getpid).result()  # which starts it

    def __enter__(self) -> "HubProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def begin(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
        return self._pool.submit(function, *args, **kwargs)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns there, or raise what it raises."""
        return self.begin(function, *args, **kwargs).result()

    def set(self, **environment: str) -> None:
        self.call(_set, environment)


def _set(environment: dict[str, str]) -> None:
    os.environ.update(environment)
