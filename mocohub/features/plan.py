"""A feature folder that any number of processes fill together, and go on filling after any of them has died.

While an extraction is under way its folder holds

    plan.json                     what shall be extracted from what, in which shards; it never changes
    part-00003-of-00008.parquet   a finished shard
    progress/computation.json     how the first worker computes, which all others have to do likewise
    progress/00003.json           rows, SHA-256 and errors of a shard; it makes the shard count as done
    progress/.00003.*.partial     a shard that is being written; if its record names it, it is the shard
    progress/00003.lease          a worker has this shard in hand, see `leases`

A shard is a run of listed images, or all of one tar that is streamed: then nobody knows how many images it
holds before it is read, and the record of a damaged one says "incomplete" with the name of the tar.
Workers never talk to each other. Every change is one atomic step of the file system: a record gets its name
when it and its shard are complete and flushed, and only if nothing has that name. Of two workers that do the
same shard the first record decides, and the file it names becomes the shard, by whoever comes next if the
worker was killed in between. Whoever finds all shards done merges `progress` into manifest.json and
errors.jsonl and removes it.
"""

import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mocohub.features.writer import shard_file, write_manifest
from mocohub.files import flush, publish, read_json, refuse_existing, remove_folder, sha256, write_json

_log = logging.getLogger(__name__)

FORMAT = "mocohub-plan/1"
_LEFTOVER_AGE_S = 86_400.0  # of a file that nobody goes on writing, whatever the clocks
_REMEDY = "Choose another --out, or remove it first."
_REMEDY_OF_RECORD = "Remove that file: its shard will be done again."
_REMEDY_OF_COMPUTATION = "Remove that file: it will be written again."
# The same weights and images may be found under another name by the next worker.
_MAY_DIFFER = ("meta.model.name", "meta.input.source")


def refuse_foreign(folder: str | Path) -> None:
    """Refuse a folder that holds anything but an extraction that was planned, begun or finished there.

    Raises:
        FileExistsError: If it does; nothing is ever overwritten.
    """
    folder = Path(folder)
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"progress"}:
        return  # somebody is about to write the plan
    if not (folder / "plan.json").is_file():
        refuse_existing(folder, f"It holds no plan.json of an extraction to go on with. {_REMEDY}")


def read_plan(folder: str | Path) -> dict[str, Any]:
    """Return what plan.json says, the `facts` of a `Plan`.

    Raises:
        ValueError: If it is the plan of something else, or of a later version.
    """
    path = Path(folder) / "plan.json"
    planned = _read_state(path, _REMEDY)
    if not isinstance(planned, dict) or planned.get("format") != FORMAT:
        raise ValueError(f"'{path}' is not the plan of an extraction ({FORMAT}). {_REMEDY}")
    return planned


class Plan:
    """The shards of one extraction: which are done, and how one becomes so."""

    def __init__(self, folder: str | Path, facts: dict[str, Any]) -> None:
        """Describe the extraction; nothing is written yet.

        Args:
            folder: Feature folder it fills.
            facts: What tells this extraction from any other, as JSON values: "num_inputs", "rows_per_shard",
                "classes", "meta" and whatever else changes the files. Of tars that are streamed both numbers
                are None, and "num_shards" is that of the tars.

        Raises:
            ValueError: If the folder is planned for another extraction; the message names what differs.
        """
        self.folder = Path(folder)
        self.progress = self.folder / "progress"
        self.num_inputs, self.rows_per_shard = facts["num_inputs"], facts["rows_per_shard"]
        is_listed = self.num_inputs is not None
        self.num_shards = -(-self.num_inputs // self.rows_per_shard) if is_listed else facts["num_shards"]
        self.facts = {"format": FORMAT, "num_shards": self.num_shards, **facts}
        if (self.folder / "plan.json").is_file():
            self._join()

    def _join(self) -> None:
        planned = read_plan(self.folder)
        refuse_to_mix(self.folder, planned, self.facts)
        self.facts = planned

    def begin(self) -> None:
        """Write plan.json, or join the process that was faster."""
        if not self.is_complete:  # anew too if the manifest of a finished folder is lost
            self.progress.mkdir(parents=True, exist_ok=True)
        if (self.folder / "plan.json").is_file():
            self.settle()
            self._remove_leftovers()
            return self._join()
        if not self.publish_json(self.facts, self.folder / "plan.json"):
            self._join()

    def _remove_leftovers(self) -> None:
        """Remove what killed workers left half written; many of them would fill the disk."""
        for path in self.progress.glob(".*.partial"):
            with suppress(FileNotFoundError):  # of a worker that lives
                if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                    path.unlink()

    def computation(self) -> dict[str, Any] | None:
        """How the workers before this one have computed; None if there was none."""
        path = self.progress / "computation.json"
        return self._read_computation() if path.is_file() else None

    def _read_computation(self) -> dict[str, Any]:
        path = self.progress / "computation.json"
        computation = _read_state(path, _REMEDY_OF_COMPUTATION)
        if not isinstance(computation, dict) or not isinstance(computation.get("network"), dict):
            raise ValueError(f"'{path}' does not say how a network computes. {_REMEDY_OF_COMPUTATION}")
        return computation

    def propose(self, computation: dict[str, Any]) -> dict[str, Any]:
        """Write how this worker computes, and return that; or how the first one did, if that was another."""
        self.publish_json(computation, self.progress / "computation.json")
        return self._read_computation()

    @property
    def is_complete(self) -> bool:
        """Whether the feature folder is finished."""
        return (self.folder / "manifest.json").is_file()

    def ids(self, shard: int) -> range:
        """Positions of the shard's images among the inputs, if these are listed."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.num_inputs))

    def done(self) -> set[int]:
        """Numbers of the shards that are done."""
        try:
            names = [name.partition(".") for name in os.listdir(self.progress)]
        except FileNotFoundError:
            names = []
            if not self.is_complete:
                raise
        if self.is_complete:  # `progress` may be half removed
            return set(range(self.num_shards))
        return {int(stem) for stem, _, suffix in names if suffix == "json" and stem.isdecimal()}

    def todo(self, share: tuple[int, int] | None) -> list[int]:
        """Numbers of the shards of a share (see `share_of`; None: of all) that are not done."""
        i, n = share or (0, 1)
        done = self.done()
        return [shard for shard in range(i, self.num_shards, n) if shard not in done]

    def is_done(self, shard: int) -> bool:
        """Whether this shard is."""
        return self.record_path(shard).is_file() or self.is_complete

    def temporary(self, shard: int) -> Path:
        """Return a new name for a shard's file while it is written."""
        return self.progress / f".{shard:05d}.{secrets.token_hex(4)}.partial"

    def commit(
        self,
        shard: int,
        temporary: Path,
        rows: int,
        errors: list[dict[str, Any]],
        *,
        num_inputs: int,
        incomplete: str | None = None,
    ) -> None:
        """Give a complete shard its name and record it, unless another process has done so.

        Args:
            shard: Its number.
            temporary: The file.
            rows: In it.
            errors: Of its inputs that have none.
            num_inputs: What the shard was made of, which rows and errors have to add up to.
            incomplete: Name of its tar, if that could not be read to its end.
        """
        expected = num_inputs if self.num_inputs is None else len(self.ids(shard))
        assert rows + len(errors) == num_inputs == expected, (
            f"shard {shard}: {rows} rows, {len(errors)} errors, {num_inputs} of {expected} inputs"
        )
        try:
            record = {"file": shard_file(shard, self.num_shards), "rows": rows, "sha256": sha256(temporary)}
            if incomplete is not None:
                record["incomplete"] = incomplete
            flush(temporary)
            if not self.is_done(shard) and self.publish_json(
                {**record, "errors": errors, "partial": temporary.name}, self.record_path(shard)
            ):
                self._name(temporary, record["file"])
        except FileNotFoundError:
            if not self.is_complete:  # else others were faster with all that was left
                raise
        finally:
            if not self._is_recorded(
                shard, temporary
            ):  # a worker that is stopped here has no time to name it
                temporary.unlink(missing_ok=True)

    def _is_recorded(self, shard: int, temporary: Path) -> bool:
        """Whether the file is there, and the shard's record says that it is to become the shard."""
        if not temporary.is_file():
            return False
        try:
            (record,) = self.records([shard])
        except FileNotFoundError:  # nobody has done it; or all is done, and cleaned up
            return False
        return record.get("partial") == temporary.name

    def _name(self, temporary: Path, file: str) -> None:
        """Give a shard that is recorded its name; nothing relies on what may have had it."""
        with suppress(FileNotFoundError):  # another process has just done it
            temporary.replace(self.folder / file)
        flush(self.folder)

    def settle(self) -> None:
        """Give the shards their names whose workers were killed when they had recorded them."""
        for path in self.progress.glob(".*.partial"):
            shard = path.name[1:].partition(".")[0]
            if shard.isdecimal() and self._is_recorded(int(shard), path):
                self._name(path, shard_file(int(shard), self.num_shards))

    def records(self, shards: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield {"file", "rows", "sha256", "errors"} of shards that are done; "incomplete" of such ones.

        Raises:
            ValueError: If a record is damaged.
        """
        for shard in shards:
            record = _read_state(self.record_path(shard), _REMEDY_OF_RECORD)
            try:
                errors = [(error["id"], error["path"], error["reason"]) for error in record["errors"]]
                num_inputs, file = record["rows"] + len(errors), shard_file(shard, self.num_shards)
                expected = num_inputs if self.num_inputs is None else len(self.ids(shard))
                if (num_inputs, record["file"], len(record["sha256"])) != (expected, file, 64):
                    raise ValueError(f"it says {num_inputs} inputs of {expected}, in '{record['file']}'")
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"'{self.record_path(shard)}' is damaged: {error}. {_REMEDY_OF_RECORD}"
                ) from error
            yield record

    def finish(self, facts: dict[str, Any]) -> None:
        """Write the manifest if all shards are done.

        Args:
            facts: What `writer.feature_facts` returned.

        Raises:
            RuntimeError: If no shard has any row.
        """
        try:
            are_done = len(self.done()) == self.num_shards
            self.settle()  # of all those; another may be recorded just now
            if are_done and not self.is_complete:
                temporary = self.progress / f"merged.{secrets.token_hex(4)}"
                temporary.mkdir()
                records = self.records(range(self.num_shards))
                manifest = write_manifest(temporary, facts, records, self.num_inputs)
                if manifest["rows"] == 0:
                    raise RuntimeError(
                        f"None of the {manifest['num_inputs']} images gave features:"
                        f"{first_errors(next(self.records([0]))['errors'])}\nRemove '{self.folder}'."
                    )
                for name in ("errors.jsonl", "manifest.json"):
                    flush(temporary / name)
                    (temporary / name).replace(self.folder / name)
                flush(self.folder)
        except FileNotFoundError:
            if not self.is_complete:  # else another process has just done the same
                raise

    def clean(self) -> None:
        """Remove what only served the work on a folder that is finished."""
        remove_folder(self.progress)
        for rest in self.folder.glob(".*.partial"):  # of a process that was killed while it did that
            remove_folder(rest)

    def record_path(self, shard: int) -> Path:
        """Where the record of a shard is."""
        return self.progress / f"{shard:05d}.json"

    def publish_json(self, value: Any, target: Path) -> bool:
        """Write a file of `progress` unless there is one; return whether this process has."""
        temporary = self.progress / f".{target.name}.{secrets.token_hex(4)}.partial"
        write_json(temporary, value)
        return publish(temporary, target)


def first_errors(errors: list[dict[str, Any]], count: int = 3) -> str:
    """Return lines that show the first errors."""
    lines = [f"\n  {error['path']}: {error['reason']}" for error in errors[:count]]
    return "".join(lines) + ("\n  ..." if len(errors) > count else "")


def _read_state(path: Path, remedy: str) -> Any:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}. {remedy}") from error


def refuse_to_mix(folder: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse to add to what was begun with other facts.

    Raises:
        ValueError: If any differ; the message names them.
    """
    theirs, ours = _flat(theirs), _flat(json.loads(json.dumps(ours)))
    names = [name for name in {**theirs, **ours} if name not in _MAY_DIFFER]
    differing = [
        f"\n  {name}: {theirs.get(name)!r} there, {ours.get(name)!r} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ValueError(
            f"'{folder}' was begun with other settings, and is not mixed with these:"
            f"{''.join(differing)}\n{_REMEDY}"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested objects under dotted names."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    prefix = f"{name}." if name else ""
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}{key}").items()}
