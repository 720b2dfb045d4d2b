"""Plans, shares and leases by themselves; whole extractions are in test_extract_faults.py."""

import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mocohub.features import leases as lease_files
from mocohub.features.leases import Leases, share_of
from mocohub.features.plan import Plan, refuse_foreign
from mocohub.features.repair import retry_damaged
from mocohub.files import read_json, sha256

FACTS = {"num_inputs": 23, "rows_per_shard": 5, "classes": None, "meta": {"model": {"name": "a", "sha": "1"}}}
HEAD = {"format": "mocohub-features/1", "num_features": 2, "dtype": "float32", "classes": None, "meta": {}}


@pytest.fixture
def plan(tmp_path):
    plan = Plan(tmp_path / "features", FACTS)
    plan.begin()
    return plan


def commit(plan, shard, content="rows", num_errors=0):
    ids = plan.ids(shard)
    temporary = plan.temporary(shard)
    temporary.write_text(content)
    errors = [{"id": i, "path": f"{i}.jpg", "reason": "broken"} for i in ids[:num_errors]]
    plan.commit(shard, temporary, len(ids) - num_errors, errors, num_inputs=len(ids))


def test_shards_cover_all_inputs_once(plan):
    assert plan.num_shards == 5
    assert [i for shard in range(5) for i in plan.ids(shard)] == list(range(23))


def test_the_plan_on_disk_is_what_the_first_process_wrote(plan):
    path = plan.folder / "plan.json"
    before = path.read_bytes()
    again = Plan(plan.folder, {**FACTS, "meta": {"model": {"name": "elsewhere/a", "sha": "1"}}})
    again.begin()
    assert path.read_bytes() == before
    assert again.facts["meta"]["model"]["name"] == "a"


def test_a_process_that_plans_otherwise_in_the_same_moment_is_refused(tmp_path):
    first, second = (Plan(tmp_path / "x", {**FACTS, "rows_per_shard": rows}) for rows in (5, 6))
    first.begin()
    with pytest.raises(ValueError, match="rows_per_shard: 5 there, 6 here"):
        second.begin()


def test_what_is_committed_is_never_written_again(plan):
    commit(plan, 2, "first")
    commit(plan, 2, "second")
    assert (plan.folder / "part-00002-of-00005.parquet").read_text() == "first"
    assert plan.done() == {2} and plan.todo((0, 2)) == [0, 4]
    assert not list(plan.progress.glob(".*.partial"))


def test_a_file_that_was_never_recorded_does_not_count(plan):
    target = plan.folder / "part-00002-of-00005.parquet"
    target.write_text("half of")
    assert not plan.is_done(2)
    commit(plan, 2, "all of it")
    assert target.read_text() == "all of it"


def test_the_manifest_comes_with_the_last_shard(plan):
    for shard in (4, 0, 3, 1):
        commit(plan, shard, num_errors=shard == 3)
        plan.finish(HEAD)
        assert not plan.is_complete
    commit(plan, 2, num_errors=2)
    plan.finish(HEAD)
    manifest = read_json(plan.folder / "manifest.json")
    assert (manifest["num_inputs"], manifest["rows"], manifest["errors"]) == (23, 20, 3)
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 5, 3, 4, 3]
    lines = (plan.folder / "errors.jsonl").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ['{"id": 10', '{"id": 11', '{"id": 15']
    plan.clean()
    names = sorted(path.name for path in plan.folder.iterdir() if path.suffix != ".parquet")
    assert names == ["errors.jsonl", "manifest.json", "plan.json"]


def test_a_shard_that_others_have_done_with_all_the_rest_meanwhile_is_dropped(plan):
    temporary = plan.temporary(0)
    temporary.write_text("rows")
    for shard in range(5):
        commit(plan, shard)
    plan.finish(HEAD)
    plan.clean()
    plan.commit(0, temporary, 5, [], num_inputs=5)
    assert plan.is_done(0) and plan.done() == set(range(5)) and not plan.progress.exists()


def test_rows_that_are_lost_are_noticed(plan):
    with pytest.raises(AssertionError, match="shard 0: 4 rows, 0 errors"):
        plan.commit(0, plan.temporary(0), 4, [], num_inputs=5)


def interrupted(plan, at, monkeypatch, interrupt):
    """Commit a shard; before the n-th step something happens. Return how many steps there were."""
    count = 0

    def counted(operation):
        def step(*args, **options):
            nonlocal count
            count += 1
            if count == at:
                interrupt()
            return operation(*args, **options)

        return step

    with monkeypatch.context() as patches:
        for owner, name in [(os, "link"), (os, "fsync")] + [
            (Path, n) for n in ("unlink", "replace", "is_file")
        ]:
            patches.setattr(owner, name, counted(getattr(owner, name)))
        with suppress(KeyboardInterrupt):
            commit(plan, 0, "second")
    return count


@pytest.mark.parametrize("is_begun", [False, True])
def test_of_two_workers_with_other_bytes_the_record_tells_the_file_that_is_there(
    tmp_path, monkeypatch, is_begun
):
    """As when one could not read an image for a moment."""
    for at in range(1, 100):
        plan = Plan(tmp_path / str(at), FACTS)
        plan.begin()
        target = plan.folder / "part-00000-of-00005.parquet"
        if is_begun:  # the first one's file has its name, but no record
            target.write_text("first")
        num_steps = interrupted(plan, at, monkeypatch, lambda plan=plan: commit(plan, 0, "first"))
        (record,) = plan.records([0])
        assert record["sha256"] == sha256(target), at
        assert not list(plan.progress.glob(".*.partial")), at
        if num_steps < at:
            break
    assert at > 6


def test_a_worker_stopped_at_any_step_of_a_commit_loses_no_shard_that_is_recorded(tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    for at in range(1, 100):
        plan = Plan(tmp_path / str(at), FACTS)
        plan.begin()
        num_steps = interrupted(plan, at, monkeypatch, stop)
        plan = Plan(plan.folder, FACTS)
        plan.begin()
        if plan.done():
            (record,) = plan.records([0])
            assert record["sha256"] == sha256(plan.folder / record["file"]), at
        assert plan.done() or num_steps >= at
        if num_steps < at:
            break
    assert at > 6


def test_a_shard_gets_its_name_from_whoever_comes_when_its_worker_was_killed(plan, monkeypatch):
    with monkeypatch.context() as patches:
        patches.setattr(Plan, "_name", lambda *args: None)
        patches.setattr(Path, "unlink", lambda *args, **options: None)
        commit(plan, 2)
    leftover = plan.temporary(2)
    leftover.write_text("half of it, by another")
    target = plan.folder / "part-00002-of-00005.parquet"
    assert plan.done() == {2} and not target.exists()
    Plan(plan.folder, FACTS).begin()
    assert target.read_text() == "rows" and leftover.exists()
    assert len(list(plan.progress.glob(f".00002.{'?' * 8}.partial"))) == 1


@pytest.mark.parametrize(
    "damage", ["", "[]", '{"file": "x"}', '{"file": 1, "rows": 5, "errors": [], "sha256": ""}', None]
)
def test_a_damaged_record_says_that_its_shard_can_be_done_again(plan, damage):
    for shard in range(5):
        commit(plan, shard)
    path = plan.record_path(3)
    path.write_text(path.read_text().replace('"rows": 5', '"rows": 4') if damage is None else damage)
    with pytest.raises(ValueError, match=r"00003.json.* Remove that file: its shard will be done again."):
        plan.finish(HEAD)
    path.unlink()
    assert plan.todo(None) == [3]


@pytest.mark.parametrize("name", ["plan.json", "progress/computation.json"])
def test_other_damaged_files_of_an_extraction_under_way_are_named_with_the_remedy(plan, name):
    plan.propose({"network": {}})
    (plan.folder / name).write_bytes(bytes(9))
    with pytest.raises(ValueError, match=f"{name} is not valid JSON: .*(Choose another --out|Remove that)"):
        Plan(plan.folder, FACTS).computation()
    (plan.folder / name).write_text("{}")
    with pytest.raises(
        ValueError, match=f"{name}' (is not|does not say).*(Choose another --out|Remove that)"
    ):
        Plan(plan.folder, FACTS).computation()


def test_without_its_manifest_a_finished_folder_is_begun_anew(plan):
    for shard in range(5):
        commit(plan, shard, "first")
    plan.finish(HEAD)
    plan.clean()
    (plan.folder / "manifest.json").unlink()
    again = Plan(plan.folder, FACTS)
    again.begin()
    assert again.todo(None) == [0, 1, 2, 3, 4]
    commit(again, 1, "second")
    assert (plan.folder / "part-00001-of-00005.parquet").read_text() == "second"


def test_shards_whose_files_are_not_what_was_recorded_are_done_again(plan):
    for shard in range(5):
        commit(plan, shard, num_errors=shard == 4)
    (plan.folder / "part-00002-of-00005.parquet").write_text("rowt")
    (plan.folder / "part-00003-of-00005.parquet").unlink()
    names = ["part-00002-of-00005.parquet", "part-00003-of-00005.parquet", "20.jpg"]
    assert retry_damaged(plan) == names
    assert plan.todo(None) == [2, 3, 4]


def test_a_plan_of_something_else_is_named(tmp_path):
    for text in ("{}", "[1]"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"plan.json' is not the plan of an extraction \(mocohub-plan/1\)"
        ):
            Plan(tmp_path, FACTS)


def test_nothing_is_to_be_read_again_where_nothing_has_begun(tmp_path):
    assert retry_damaged(Plan(tmp_path / "features", FACTS)) == []


def test_a_file_system_without_hard_links_will_do(plan, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    leases = [Leases(plan) for _ in range(2)]
    assert [lease.take(1) for lease in leases] == [True, False]
    commit(plan, 1, "first")
    commit(plan, 1, "second")
    assert (plan.folder / "part-00001-of-00005.parquet").read_text() == "first"


def test_only_one_worker_has_a_shard(plan):
    first, second = Leases(plan), Leases(plan)
    assert first.take(3) and first.take(3)
    assert not second.take(3)
    assert second.take(4)
    first.give_back(3)
    assert second.take(3)
    second.give_all_back()
    assert first.take(3) and first.take(4)


def test_a_link_that_nfs_has_made_and_denies_is_a_lease_all_the_same(plan, monkeypatch):
    link = os.link

    def link_and_lose_the_answer(source, target):
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link_and_lose_the_answer)
    assert Leases(plan).take(0)
    assert not Leases(plan).take(0)


def test_a_lease_runs_out_unless_it_is_renewed(plan, monkeypatch):
    first, second = Leases(plan), Leases(plan)
    assert first.take(0) and first.take(1)
    long_ago = time.time() - lease_files.LEASE_TIMEOUT_S - 60
    for shard in (0, 1):
        os.utime(plan.progress / f"{shard:05d}.lease", (long_ago, long_ago))
    assert second.take(0)
    assert not first._plan.is_done(0)
    monkeypatch.setattr(lease_files, "_BEAT_S", 0)
    first.beat()
    assert not second.take(1)
    (plan.progress / "00001.lease").unlink()
    first.beat()  # as if taken from it and done: no error


def test_the_lease_of_a_process_that_is_dead_here_is_taken_at_once(plan):
    dead = subprocess.Popen(["true"])
    dead.wait()
    lease = plan.progress / "00000.lease"
    leases = Leases(plan)
    for owner, taken in (
        (f"{socket.gethostname()} {os.getpid()} 00", False),
        (f"elsewhere {dead.pid} 00", False),
        ("", False),
        (f"{socket.gethostname()} {dead.pid} 00", True),
    ):
        lease.write_text(owner)
        assert leases.take(0) == taken, owner


def test_half_a_shard_of_a_killed_worker_is_removed_a_day_later(plan):
    old, young = plan.temporary(0), plan.temporary(1)
    for path in (old, young):
        path.write_text("half")
    commit(plan, 2)
    for path in (old, *plan.progress.glob("*.json")):
        os.utime(path, (time.time() - 90_000,) * 2)
    Plan(plan.folder, FACTS).begin()
    assert not old.exists() and young.exists() and plan.done() == {2}


def test_a_shard_that_is_done_is_not_taken(plan):
    commit(plan, 0)
    assert not Leases(plan).take(0)
    assert not list(plan.progress.glob("*.lease"))


def test_another_folder_is_refused(tmp_path):
    refuse_foreign(tmp_path / "nothing")
    refuse_foreign(tmp_path)
    (tmp_path / "progress").mkdir()
    refuse_foreign(tmp_path)  # another process is about to write its plan
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match="already exists. It holds no plan.json .* Choose another --out"
    ):
        refuse_foreign(tmp_path)
    with pytest.raises(FileExistsError, match="notes.txt' already exists"):
        refuse_foreign(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
        ({"SLURM_ARRAY_TASK_ID": "7"}, (0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "10"}, (7, 10)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "10", "SLURM_ARRAY_TASK_MIN": "1"}, (6, 10)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_MIN": "0",
                "RANK": "1",
                "WORLD_SIZE": "4",
            },
            (9, 12),
        ),
    ],
)
def test_the_share_of_a_process_of_a_cluster(environ, expected):
    assert share_of(None, environ) == expected
    assert share_of("1/3", environ) == (1, 3)
    assert share_of("lease", environ) is None


def test_a_hundred_thousand_planned_shards_are_looked_through_in_seconds(tmp_path):
    plan = Plan(tmp_path / "features", {**FACTS, "num_inputs": 500_000})
    plan.begin()
    for shard in range(0, 100_000, 10):
        (plan.progress / f"{shard:05d}.json").write_text("{}")
    start = time.process_time()  # of the processor: others may compute beside, and the disk be slow
    plan = Plan(tmp_path / "features", {**FACTS, "num_inputs": 500_000})
    assert plan.todo((1, 10))[:2] == [1, 11] and len(plan.todo(None)) == 90_000
    assert time.process_time() - start < 3
