"""Shards that are done again on request, of an extraction that is finished or under way."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mocohub.features.manifest import read_errors, read_manifest
from mocohub.features.plan import Plan
from mocohub.features.writer import columns_of
from mocohub.files import sha256
from mocohub.shard_reader import IDS_PER_SHARD


def retry_damaged(plan: Plan) -> list[str]:
    """Have shards done again: of tars that were damaged, or of listed images some of which have no row.

    So are shards whose file is not the one that was recorded, for which every byte is read once. A finished
    folder is under way again afterwards; a kill in the midst of it leaves it finished. Only one process may
    call this, and before others join.

    Returns:
        The names of what was damaged.

    Raises:
        ValueError: If the folder is finished in another layout than Parquet, or its manifest is damaged.
    """
    if not (plan.is_complete or plan.progress.is_dir()):  # nothing has begun
        return []
    if plan.is_complete:
        records = _finished_records(plan)
    else:
        plan.settle()
        done = sorted(plan.done())
        records = dict(zip(done, plan.records(done), strict=True))
    with ThreadPoolExecutor(4) as pool:
        are_whole = list(pool.map(lambda record: _is_whole(plan, record), records.values()))
    damaged = {}
    for (shard, record), is_whole in zip(records.items(), are_whole, strict=True):
        of_tar = [record["incomplete"]] if "incomplete" in record else []
        names = of_tar if plan.num_inputs is None else [error["path"] for error in record["errors"]]
        if names or not is_whole:
            damaged[shard] = names if is_whole else [record["file"], *names]
    if damaged and plan.is_complete:
        plan.progress.mkdir(exist_ok=True)
        plan.publish_json(_finished_computation(plan), plan.progress / "computation.json")
        for shard in records.keys() - damaged.keys():
            plan.publish_json(records[shard], plan.record_path(shard))
        (plan.folder / "manifest.json").unlink()
    for shard in damaged:
        plan.record_path(shard).unlink(missing_ok=True)
    return [name for names in damaged.values() for name in names]


def _is_whole(plan: Plan, record: dict[str, Any]) -> bool:
    try:
        return sha256(plan.folder / record["file"]) == record["sha256"]
    except (OSError, ValueError):
        return False


def _finished_records(plan: Plan) -> dict[int, dict[str, Any]]:
    """Return the records of a finished folder, by shard."""
    manifest = read_manifest(plan.folder)
    if not all("file" in record for record in manifest["shards"]):
        raise ValueError(
            f"'{plan.folder}' is finished in the layout '{manifest['format']}', but shards can be done "
            "again in Parquet only. First repeat the call with --format parquet, not --retry-damaged."
        )
    records = {shard: {**record, "errors": []} for shard, record in enumerate(manifest["shards"])}
    for error in read_errors(plan.folder, manifest):
        records[error["id"] // (plan.rows_per_shard or IDS_PER_SHARD)]["errors"].append(error)
    return records


def _finished_computation(plan: Plan) -> dict[str, Any]:
    """Return how a finished folder was computed, as `Plan.propose` has it."""
    manifest = read_manifest(plan.folder)
    meta = manifest["meta"]
    network = {name: value for name, value in meta["computation"].items() if name != "batch_size"}
    computation = {"device": network.pop("device"), "network": network}
    return computation | {"columns": columns_of(manifest), "versions": meta["versions"]}
