"""An extraction on a Ray cluster that runs already: the workers of any other one, as tasks of Ray.

They share a plan and take shards by lease, so that any number may die or join: Ray starts a task again when
its process or machine is lost, and its shard is free once the lease has run out. Workers and this process see
the feature folder and the images under the same paths.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from mocohub.errors import missing_extra
from mocohub.features import repair
from mocohub.features.extract import extract, write_plan
from mocohub.features.formats import change_layout
from mocohub.features.plan import Plan
from mocohub.features.store import Features
from mocohub.files import read_json
from mocohub.tars import is_url

_log = logging.getLogger(__name__)

_TRIES = 20  # of a task whose process or machine is lost
_POLL_S = 1.0


def extract_on_ray(
    model: nn.Module | str | Path,
    images: Any,
    *,
    out: str | Path,
    ray_address: str = "auto",
    ray_workers: int | None = None,
    ray_gpus: float | None = None,
    ray_cpus: float | None = None,
    retry_damaged: bool = False,
    progress: bool = True,
    **options: Any,
) -> Features:
    """Fill a feature folder by workers on a Ray cluster; the bytes are those of `extract`.

    Args:
        model: As for `extract`.
        images: Likewise.
        out: Feature folder, on a file system that all workers share.
        ray_address: Of the cluster. If this process is connected to one (`ray.init`), that is taken.
        ray_workers: How many. Default: as many as the cards give room for; on a cluster without cards one
            for each machine. Those there is no room for wait.
        ray_gpus: Cards of a worker, also a part of one. Default: 1 if the cluster has any.
        ray_cpus: Cores of a worker. Default: its share of all.
        retry_damaged: As for `extract`.
        progress: Show shards done, and the time left; on a terminal only.
        options: Of `extract`, but for `shard`. Default of `num_workers`, which decode: as many as cores.

    Raises:
        ValueError, FileExistsError: As `extract` does, before any worker is started; or if no machine of the
            cluster has so many cards or cores.
        RuntimeError: If there is no cluster, or workers were lost again and again; what is done stays, and
            the same call goes on. What else a worker raises is raised here.
        ImportError: If ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise missing_extra("ray", "ray", "The launcher 'ray'") from None
    model, images, out = _absolute(model, must_exist=True), _absolute(images), _absolute(out)
    if isinstance(options.get("projection"), str | Path):
        options["projection"] = _absolute(options["projection"])
    file = write_plan(model, images, out=out, **{**options, "device": None})  # the card is the workers'
    format = options.pop("format", None)
    plan = Plan(out, read_json(file))
    if retry_damaged:
        repair.retry_damaged(plan)
    if not plan.is_complete:
        arguments = {"model": model, "images": images, "out": out, **options}
        room = {"num_workers": ray_workers, "gpus": ray_gpus, "cpus": ray_cpus}
        with _connected(ray, ray_address):
            count, resources = _room(ray.nodes(), **room)
            if arguments.get("num_workers") is None:
                arguments["num_workers"] = max(1, int(resources["num_cpus"]))
            task = ray.remote(**resources, max_retries=_TRIES, scheduling_strategy="SPREAD")(_work)
            shared = ray.put(arguments)
            _wait(ray, [task.remote(shared) for _ in range(count)], plan, progress)
    if format is not None:
        change_layout(out, format)
    return Features.open(out, verify=False)


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Be connected to a cluster; a connection that was there before stays."""
    is_guest = ray.is_initialized()
    try:
        if not is_guest:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise RuntimeError(
            f"There is no Ray cluster at '{address}', or it does not let us in: {error}. Start one with "
            "`ray start --head`, or give the address of another; one with tokens needs RAY_AUTH_MODE=token."
        ) from error
    try:
        yield
    finally:
        if not is_guest:
            ray.shutdown()


def _work(arguments: dict[str, Any]) -> None:
    """Do shards that nobody has in hand until all are done: one worker."""
    extract(**arguments, shard="lease", progress=False)


def _wait(ray: Any, tasks: list[Any], plan: Plan, progress: bool) -> None:
    """Wait for all workers; raise the first of their errors unless the others could do without that one."""
    failed: Exception | None = None
    with tqdm(total=plan.num_shards, desc="extract", unit="shard", disable=None if progress else True) as bar:
        bar.update(len(plan.done()))
        while tasks:
            ended, tasks = ray.wait(tasks, timeout=_POLL_S)
            for task in ended:
                try:
                    ray.get(task)
                except ray.exceptions.RayTaskError as error:
                    failed = failed or error.cause
                except ray.exceptions.RayError as error:
                    failed = failed or RuntimeError(
                        f"A worker on Ray was lost {_TRIES + 1} times: {error}\nWhat is done stays: repeat "
                        "the call, with fewer workers on a machine if memory was the reason."
                    )
            bar.update(len(plan.done()) - bar.n)
    if failed is not None and not plan.is_complete:
        raise failed
    if failed is not None:
        _log.warning("A worker has failed, the others have done all: %s", failed)


def _room(
    nodes: list[dict[str, Any]], num_workers: int | None, gpus: float | None, cpus: float | None
) -> tuple[int, dict[str, float]]:
    """Return the number of workers and what each takes of its machine."""
    machines = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    total = {kind: sum(machine.get(kind, 0) for machine in machines) for kind in ("CPU", "GPU")}
    largest = {kind: max((machine.get(kind, 0) for machine in machines), default=0) for kind in total}
    gpus = min(1, largest["GPU"]) if gpus is None else gpus
    if num_workers is None:
        num_workers = max(1, int(total["GPU"] / gpus) if gpus else len(machines))
    if cpus is None:
        cpus = max(1, min(total["CPU"] // num_workers, largest["CPU"]))
    for name, wanted, kind in (("ray_gpus", gpus, "GPU"), ("ray_cpus", cpus, "CPU")):
        if wanted > largest[kind]:
            raise ValueError(
                f"{name} is {wanted:g} for a worker, but no machine of the cluster has more than "
                f"{largest[kind]:g}. Give fewer."
            )
    return num_workers, {"num_gpus": gpus, "num_cpus": cpus}


def _absolute(value: Any, *, must_exist: bool = False) -> Any:
    """Return paths as other working directories see them, and everything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(_absolute(entry, must_exist=must_exist) for entry in value)
    if not isinstance(value, str | Path) or is_url(str(value)):
        return value
    return os.path.abspath(value) if os.path.exists(value) or not must_exist else value
