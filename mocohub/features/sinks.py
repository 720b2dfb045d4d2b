"""Where rows go as they come: into the shards of a feature folder, or into memory."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np

from mocohub.features.leases import Leases
from mocohub.features.plan import Plan, first_errors
from mocohub.features.rows import Portion, RowMaker
from mocohub.features.store import Features
from mocohub.features.writer import NO_LABEL, ShardWriter


def write_shards(
    portions: Iterator[Portion],
    plan: Plan,
    facts: dict[str, Any],
    extras: Sequence[str],
    leases: Leases | None,
) -> None:
    """Write each shard; its hash is computed and the disk awaited while the next one is under way."""
    writer, temporary, shard_errors = None, None, []
    commits: list[Future[None]] = []

    def commit(shard: Any, *file: Any) -> None:
        plan.commit(shard.number, *file, num_inputs=shard.num_inputs, incomplete=shard.incomplete)
        if leases is not None:
            leases.give_back(shard.number)

    try:
        with ThreadPoolExecutor(1) as pool, closing(portions):
            for shard, rows, errors in portions:
                if temporary is None:
                    temporary, shard_errors = plan.temporary(shard.number), []
                    writer = ShardWriter(temporary, facts, extras)
                shard_errors += errors
                if rows is not None:
                    writer.write(*rows)
                if shard.is_finished:
                    writer.close()
                    for earlier in commits:
                        earlier.result()  # raises what went wrong there
                    commits = [pool.submit(commit, shard, temporary, writer.rows, shard_errors)]
                    writer = temporary = None  # the commit removes it
        for last in commits:
            last.result()
    except FileNotFoundError:
        if not plan.is_complete:  # else other processes have done all there was, this shard too
            raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def gather(portions: Iterator[Portion], maker: RowMaker, meta: dict[str, Any]) -> Features:
    """Keep all rows in memory."""
    inputs, errors, count = maker.inputs, [], 0
    ids, paths, labels, extras = [], [], [], {name: [] for name in maker.extras}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in maker.columns}
    # All at once where their number is known, since joining batches at the end needs twice the memory.
    num_inputs = 0 if inputs.is_stream else len(inputs)
    values = {
        name: np.empty((num_inputs, width), maker.output_dtype) for name, width in maker.columns.items()
    }
    for shard, rows, new_errors in portions:
        errors += new_errors
        num_inputs += shard.num_inputs if inputs.is_stream and shard.is_finished else 0
        if rows is None:
            continue
        for name, column in rows.values.items():
            if inputs.is_stream:
                parts[name].append(column)
            else:
                values[name][count : count + len(rows.ids)] = column
        count += len(rows.ids)
        ids += rows.ids.tolist()
        paths += rows.paths
        labels += rows.labels.tolist()
        for name, column in rows.extras.items():
            extras[name] += column
    assert count + len(errors) == num_inputs
    if not count:
        raise RuntimeError(f"None of the {num_inputs} images gave features:{first_errors(errors)}")
    if inputs.is_stream:
        values = {name: np.concatenate(columns) for name, columns in parts.items()}
    values = {name: column[:count] for name, column in values.items()}
    labels = None if set(labels) == {NO_LABEL} else labels
    return Features(values, ids, paths, labels, inputs.classes, errors, meta, extras, shapes=maker.shapes)
