import dataclasses
import hashlib
import io
import json
import logging
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.shards import make_tar, tar_bytes
from PIL import Image
from torch.testing._internal.distributed.fake_pg import FakeStore

from mocohub.pretrain import stream as stream_module
from mocohub.pretrain.data import Batch, make_views
from mocohub.pretrain.randomness import permutation, stream
from mocohub.pretrain.recipe import Recipe
from mocohub.pretrain.stream import Lanes, merge_positions, stream_loader
from mocohub.shard_reader import IDS_PER_SHARD, ShardError, read_shard
from mocohub.shards import Shards, list_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

RECIPE = Recipe(global_batch_size=8, bn_group_size=4, queue_size=16, crop_px=8, steps=9)
SIZES = [5, 3, 9, 1, 7]  # images in each shard


def png(number: int) -> bytes:
    pixels = np.random.RandomState(number).randint(0, 256, (10, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shards(folder: Path, sizes: Iterable[int] = SIZES, broken: Iterable[int] = ()) -> Shards:
    """Write FOLDER/0.tar ...; `broken` are ids of images that shall not decode."""
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        members = {}
        for i in range(size):
            number = shard * IDS_PER_SHARD + i
            members[f"{i:03d}.png"] = b"not an image" if number in broken else png(shard * 100 + i)
            members[f"{i:03d}.json"] = b"{}"
        make_tar(folder / f"{shard}.tar", members, tarfile.PAX_FORMAT)
    return list_shards(folder)


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return write_shards(tmp_path / "shards")


def contents(batches: Iterable[Batch]) -> list[tuple[list[int], str]]:
    """The ids and a digest of all crops of each batch."""
    return [
        (
            batch.ids.tolist(),
            hashlib.sha256(
                batch.x_q.pixels.numpy().tobytes() + batch.x_k.pixels.numpy().tobytes()
            ).hexdigest(),
        )
        for batch in batches
    ]


def ids_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch.ids.tolist() for batch in batches]


# The order


def slow_lane(sizes: list[int], seed: int, lane: int, num_lanes: int, per_block: int, num: int) -> list:
    """The first (epoch, id)s of a lane from the definition: all shards, then blocks, then their order."""
    rows = []
    for turn in range(lane, 10_000, num_lanes):
        epoch, i = divmod(turn, len(sizes))
        shard = int(permutation(seed, "shards", epoch, len(sizes))[i])
        rows += [(epoch, shard * IDS_PER_SHARD + j) for j in range(sizes[shard])]
        if len(rows) > num + 2 * per_block:
            break
    result, block = [], 0
    while len(result) < num:
        same = [row for row in rows[:per_block] if row[0] == rows[0][0]]
        result += [same[i] for i in stream(seed, "block", lane, block).permutation(len(same))]
        rows, block = rows[len(same) :], block + 1
    return result[:num]


@pytest.mark.parametrize(("num_lanes", "buffer_images"), [(1, 1), (1, 7), (2, 8), (4, 64), (4, 2)])
def test_the_order_is_that_of_its_definition(shards: Shards, num_lanes: int, buffer_images: int) -> None:
    lanes = Lanes(shards.urls, RECIPE.seed, num_lanes, buffer_images)
    expected = []
    for lane in range(num_lanes):
        per_block = max(1, buffer_images // num_lanes)
        expected.append(slow_lane(SIZES, RECIPE.seed, lane, num_lanes, per_block, 72))
        found = [item for item, _ in islice(lanes.read(lane, lanes.start(lane)), 72)]
        assert [(item.epoch, item.image_id) for item in found] == expected[-1]
        images = [png(item.image_id // IDS_PER_SHARD * 100 + item.found.index) for item in found]
        assert [item.found.data for item in found] == images
    steps = ids_of(stream_loader(shards, RECIPE, num_lanes=num_lanes, buffer_images=buffer_images))
    each = 8 // num_lanes
    for step, ids in enumerate(steps):
        assert ids == [i for rows in expected for _, i in rows[step * each : (step + 1) * each]]


@pytest.mark.parametrize("num_lanes", [1, 2, 4, 5])
def test_each_image_comes_once_in_every_epoch_of_its_lane(shards: Shards, num_lanes: int) -> None:
    lanes = Lanes(shards.urls, 0, num_lanes, 6)
    seen, unfinished = Counter(), 99
    for lane in range(num_lanes):
        items = [item for item, _ in islice(lanes.read(lane, lanes.start(lane)), 150)]
        seen.update((item.epoch, item.image_id) for item in items)
        unfinished = min(unfinished, items[-1].epoch)
    all_ids = {shard * IDS_PER_SHARD + i for shard, size in enumerate(SIZES) for i in range(size)}
    assert set(seen.values()) == {1}
    assert unfinished > 3
    for epoch in range(unfinished):
        assert {image_id for e, image_id in seen if e == epoch} == all_ids


def test_seed_epoch_and_buffer_change_the_order(shards: Shards) -> None:
    def order(recipe: Recipe = RECIPE, **options: int) -> list[list[int]]:
        return ids_of(stream_loader(shards, recipe, num_lanes=2, **options))

    assert order() == order()
    assert order() != order(dataclasses.replace(RECIPE, seed=1))
    assert order() != order(buffer_images=4)


def test_rows_show_the_views_of_their_image(shards: Shards) -> None:
    recipe = dataclasses.replace(RECIPE, steps=4)
    batches = list(stream_loader(shards, recipe, num_lanes=1, buffer_images=5))
    expected = iter(slow_lane(SIZES, recipe.seed, 0, 1, 5, 32))
    for batch in batches:
        assert batch.ids.dtype == torch.int64 and batch.broken == []
        for row, image_id in enumerate(batch.ids.tolist()):
            epoch, _ = next(expected)
            data = png(image_id // IDS_PER_SHARD * 100 + image_id % IDS_PER_SHARD)
            views = make_views(data, recipe, epoch, image_id, on_device=False)
            assert batch.x_q.pixels[row].equal(views[0].pixels) and batch.x_k.pixels[row].equal(
                views[1].pixels
            )


def test_crops_for_the_device_keep_their_parameters(shards: Shards) -> None:
    alone = list(stream_loader(shards, RECIPE, num_lanes=4, on_device=True))
    joined = list(stream_loader(shards, RECIPE, num_lanes=4, on_device=True, num_workers=2))
    for one, other in zip(alone, joined, strict=True):
        for x, y in ((one.x_q, other.x_q), (one.x_k, other.x_k)):
            assert x.pixels.equal(y.pixels) and x.parameters.equal(y.parameters)
            assert x.parameters.shape == (8, 11)


# Ranks and workers


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_do_not_change_the_batches(shards: Shards, num_workers: int) -> None:
    alone = stream_loader(shards, RECIPE, num_lanes=4, buffer_images=8)
    together = stream_loader(shards, RECIPE, num_lanes=4, buffer_images=8, num_workers=num_workers)
    for step, (one, other) in enumerate(zip(alone, together, strict=True), 1):
        assert contents([one]) == contents([other])
        assert alone.position_after(step) == together.position_after(step)  # though workers are ahead
    assert len(alone) == len(together) == step == 9


@contextmanager
def as_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be one of several ranks for code that asks which it is, and does not talk to the others."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batches_and_positions_of_one(shards: Shards, world_size: int) -> None:
    def of_one_rank(num_workers: int = 0) -> list[tuple[Batch, dict]]:
        loader = stream_loader(shards, RECIPE, num_lanes=4, buffer_images=8, num_workers=num_workers)
        return [(batch, loader.position_after(step)) for step, batch in enumerate(loader, 1)]

    expected = of_one_rank()
    of_ranks = []
    for rank in range(world_size):
        with as_rank(rank, world_size):
            of_ranks.append(of_one_rank(num_workers=rank % 3))
    for (batch, position), *parts in zip(expected, *of_ranks, strict=True):
        assert torch.cat([part.ids for part, _ in parts]).equal(batch.ids)
        for view in ("x_q", "x_k"):
            assert torch.cat([getattr(p, view).pixels for p, _ in parts]).equal(getattr(batch, view).pixels)
        assert merge_positions([part_position for _, part_position in parts[::-1]]) == position


def test_a_run_goes_on_with_another_number_of_ranks(shards: Shards) -> None:
    options = {"num_lanes": 4, "buffer_images": 8}
    expected = ids_of(stream_loader(shards, RECIPE, **options))
    found, position = [[] for _ in expected], None
    for world_size, start, stop in ((1, 0, 2), (4, 2, 5), (2, 5, 6), (1, 6, 9)):
        positions = []
        for rank in range(world_size):
            with as_rank(rank, world_size):
                loader = stream_loader(shards, RECIPE, start_step=start, position=position, **options)
                for step, batch in enumerate(islice(loader, stop - start), start):
                    found[step] += batch.ids.tolist()
                positions.append(loader.position_after(stop))
        position = merge_positions(positions)
    assert found == expected


# Resuming


@pytest.mark.parametrize(("num_lanes", "buffer_images"), [(1, 7), (4, 12), (2, 2)])
def test_a_stream_goes_on_from_the_position_of_any_step(
    shards: Shards, num_lanes: int, buffer_images: int
) -> None:
    loader = stream_loader(shards, RECIPE, num_lanes=num_lanes, buffer_images=buffer_images)
    positions = [loader.position_after(0)]
    whole = []
    for step, batch in enumerate(loader, 1):
        whole += contents([batch])
        positions.append(json.loads(json.dumps(merge_positions([loader.position_after(step)]))))
    for step, position in enumerate(positions):
        rest = stream_loader(shards, RECIPE, start_step=step, position=position, num_workers=step % 3)
        assert contents(rest) == whole[step:]
        assert rest.position_after(9) == positions[-1]


def test_resuming_reads_two_buffers_and_not_what_came_before(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s", [60, 60])
    options = {"num_lanes": 2, "buffer_images": 16}
    loader = stream_loader(shards, RECIPE, **options)
    list(loader)  # 36 images of each lane
    lanes = Lanes(shards.urls, RECIPE.seed, 2, 16)
    for lane, position in enumerate(loader.position_after(9)["positions"]):
        turn, index, offset = position[1:4]
        assert (turn, index) == (lane, 32) and offset > 32 * 1024
        # Nothing before that byte is needed any more.
        url = lanes.urls[int(permutation(RECIPE.seed, "shards", 0, 2)[lane])]
        data = Path(url).read_bytes()
        Path(url).write_bytes(bytes(offset) + data[offset:])
    recipe = dataclasses.replace(RECIPE, steps=12)
    rest = ids_of(stream_loader(shards, recipe, start_step=9, position=loader.position_after(9)))
    again = write_shards(tmp_path / "again", [60, 60])
    assert rest == ids_of(stream_loader(again, recipe, **options))[9:]


def test_a_position_of_something_else_is_refused(shards: Shards) -> None:
    loader = stream_loader(shards, RECIPE, num_lanes=4)
    next(iter(loader))
    position = loader.position_after(1)
    with pytest.raises(ValueError, match="does not fit: step was 1, now 2. Resume with the same"):
        stream_loader(shards, RECIPE, start_step=2, position=position)
    with pytest.raises(ValueError, match="num_lanes was 4, now 2; buffer_images was 8192, now 5"):
        stream_loader(shards, RECIPE, start_step=1, position=position, num_lanes=2, buffer_images=5)
    with pytest.raises(ValueError, match="shards_sha256 was .*, now "):
        stream_loader(list_shards(shards.urls[:4]), RECIPE, start_step=1, position=position)
    with pytest.raises(ValueError, match="Step 3 of a stream can only be found with the position saved"):
        stream_loader(shards, RECIPE, start_step=3)


# Broken images and shards


def test_the_next_image_of_the_lane_replaces_a_broken_one(tmp_path: Path) -> None:
    bad = {2 * IDS_PER_SHARD + i for i in (0, 3, 4, 8)} | {3 * IDS_PER_SHARD}
    whole = write_shards(tmp_path / "whole")
    shards = write_shards(tmp_path / "broken", broken=bad)
    recipe = dataclasses.replace(RECIPE, steps=6)
    options = {"num_lanes": 2, "buffer_images": 8}
    batches = list(stream_loader(shards, recipe, **options))
    together = list(stream_loader(shards, recipe, **options, num_workers=2))
    assert contents(batches) == contents(together)
    assert [batch.broken for batch in batches] == [batch.broken for batch in together]
    failed = {i: reason for batch in batches for replaced in batch.broken for i, reason in replaced}
    assert failed.keys() == bad
    assert failed[2 * IDS_PER_SHARD + 3].startswith("'003.png': not a JPEG")
    assert shards.path(2 * IDS_PER_SHARD + 3) == "2.tar#3"
    for lane in range(2):
        lanes = Lanes(whole.urls, recipe.seed, 2, 8)
        sound = (item.image_id for item, _ in lanes.read(lane, lanes.start(lane)) if item.image_id not in bad)
        rows = [i for ids in ids_of(batches) for i in ids[4 * lane : 4 * lane + 4]]
        assert rows == list(islice(sound, 24))


def test_resuming_repeats_what_was_broken(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "s", broken={0, 1, IDS_PER_SHARD, 4 * IDS_PER_SHARD + 2})
    loader = stream_loader(shards, RECIPE, num_lanes=4, buffer_images=12)
    whole, positions = [], [loader.position_after(0)]
    for step, batch in enumerate(loader, 1):
        whole.append((contents([batch]), batch.broken))
        positions.append(loader.position_after(step))
    for step, position in enumerate(positions):
        rest = stream_loader(shards, RECIPE, start_step=step, position=position)
        assert [(contents([batch]), batch.broken) for batch in rest] == whole[step:]


def test_nothing_but_broken_images_is_an_error_with_reasons(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(stream_module, "_TRIES", 20)
    shards = write_shards(tmp_path / "s", broken=range(1 << 30))
    message = r"20 images, one after the other, cannot be decoded: \d.tar#\d: '00\d.png': not a JPEG"
    for num_workers in (0, 1):
        with pytest.raises(ShardError, match=message):
            list(stream_loader(shards, RECIPE, num_workers=num_workers))


def cut_in_the_eighth_image(shard: str) -> bytes:
    """Cut a shard and return what it was."""
    whole, seventh = Path(shard).read_bytes(), list(read_shard(shard))[6]
    Path(shard).write_bytes(whole[: seventh.end + 1024 + 700])
    return whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cut_shard_ends_the_run_and_the_run_goes_on_when_it_is_repaired(
    shards: Shards, num_workers: int
) -> None:
    options = {"num_lanes": 2, "buffer_images": 6, "num_workers": num_workers}
    expected = contents(stream_loader(shards, RECIPE, **options))
    whole = cut_in_the_eighth_image(shards.urls[2])
    loader, found = stream_loader(shards, RECIPE, **options), []
    with pytest.raises(ShardError, match=r"^Tar shard '.*2.tar' cannot be read beyond .* on_damage='skip'"):
        for batch in loader:
            found += contents([batch])
    assert found == expected[: len(found)]
    Path(shards.urls[2]).write_bytes(whole)
    rest = stream_loader(
        shards, RECIPE, start_step=len(found), position=loader.position_after(len(found)), **options
    )
    assert contents(rest) == expected[len(found) :]


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_can_be_skipped_and_is_counted(shards: Shards, damage: str) -> None:
    if damage == "cut":
        cut_in_the_eighth_image(shards.urls[2])
    else:
        Path(shards.urls[2]).unlink()
    recipe = dataclasses.replace(RECIPE, steps=6)
    options = {"num_lanes": 2, "buffer_images": 6, "on_damage": "skip"}
    batches = list(stream_loader(shards, recipe, **options))
    assert contents(batches) == contents(stream_loader(shards, recipe, **options, num_workers=2))
    found = [i for ids in ids_of(batches) for i in ids]
    num_left = 7 if damage == "cut" else 0
    assert {i - 2 * IDS_PER_SHARD for i in found if i // IDS_PER_SHARD == 2} == set(range(num_left))
    (image_id, reason), *_ = [failed for batch in batches for replaced in batch.broken for failed in replaced]
    assert shards.path(image_id) == f"2.tar#{num_left}" and "2.tar' cannot be read beyond byte" in reason
    for step in range(6):
        loader = stream_loader(shards, recipe, **options)
        seen = list(islice(loader, step))
        rest = stream_loader(
            shards, recipe, start_step=step, position=loader.position_after(step), on_damage="skip"
        )
        assert contents(seen) + contents(rest) == contents(batches)


def test_a_shard_that_cannot_be_read_for_now_is_never_skipped(shards: Shards, monkeypatch) -> None:
    from mocohub import tars

    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Down(MemoryFileSystem):
        protocol = "down"

        def open(self, *args: object, **options: object) -> None:
            raise ConnectionError("no route to host")

    fsspec.register_implementation("down", Down, clobber=True)
    monkeypatch.setattr(tars, "_RETRY_AFTER_S", (0.0,))
    with pytest.raises(ShardError, match="no route to host. Check the connection and access"):
        list(stream_loader(list_shards("down://x/{0..9}.tar"), RECIPE, on_damage="skip"))


# Memory and settings


def test_memory_holds_the_buffer_and_no_more(tmp_path: Path) -> None:
    size = 100_000
    for shard in range(2):
        members = {f"{i}.jpg": bytes(size) for i in range(60)}
        (tmp_path / f"{shard}.tar").write_bytes(tar_bytes(members))
    lanes = Lanes(list_shards(tmp_path).urls, 0, 2, 20)
    tracemalloc.start()
    for item, _ in islice(lanes.read(0, lanes.start(0)), 100):
        assert len(item.found.data) == size
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 10 * size < peak_bytes < 16 * size


def test_the_default_number_of_lanes_divides_the_batch_and_not_the_ranks(tmp_path: Path) -> None:
    for batch, num_shards, expected in (
        (256, 1000, 128),
        (256, 100, 64),
        (96, 1000, 96),
        (8, 5, 4),
        (8, 1, 1),
    ):
        shards = list_shards([f"memory://s/{i}.tar" for i in range(num_shards)])
        recipe = dataclasses.replace(RECIPE, global_batch_size=batch)
        assert stream_loader(shards, recipe).position_after(0)["num_lanes"] == expected


def test_settings_that_do_not_go_together_are_refused(shards: Shards) -> None:
    with as_rank(1, 2):
        with pytest.raises(ValueError, match=r"num_lanes \(1\) must divide .* 2 processes .* one of: 2, 4."):
            stream_loader(shards, RECIPE, num_lanes=1)
        with pytest.raises(ValueError, match="There is no such number: make at least 2 shards, or use fewer"):
            stream_loader(list_shards(shards.urls[:1]), RECIPE)
    for num_lanes in (0, 3, 8):
        with pytest.raises(
            ValueError, match=rf"num_lanes \({num_lanes}\) must .*\(5\). Choose one of: 1, 2, 4."
        ):
            stream_loader(shards, RECIPE, num_lanes=num_lanes)
    with pytest.raises(ValueError, match=r"buffer_images \(0\) must be at least 1"):
        stream_loader(shards, RECIPE, buffer_images=0)
    with pytest.raises(ValueError, match="Unknown on_damage 'ignore'. Choose one of: stop, skip"):
        stream_loader(shards, RECIPE, on_damage="ignore")
    with pytest.raises(ValueError, match="memory bank .* cannot train from a stream"):
        stream_loader(shards, dataclasses.replace(RECIPE, mechanism="memory_bank"))
    with pytest.raises(ValueError, match=r"length of the training is unknown.* \(num_images\), or steps"):
        stream_loader(shards, dataclasses.replace(RECIPE, steps=0))


def test_epochs_are_numbers_of_steps_where_the_number_of_images_is_known(tmp_path: Path) -> None:
    write_shards(tmp_path / "s")
    shards = list_shards(tmp_path / "s", num_images=sum(SIZES))
    recipe = dataclasses.replace(RECIPE, steps=0, epochs=2)
    assert len(list(stream_loader(shards, recipe))) == 2 * (25 // 8)


def test_more_workers_than_lanes_are_not_started(shards: Shards, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loader = stream_loader(shards, RECIPE, num_lanes=2, num_workers=3)
    assert "This rank has 2 of 2 lanes, so 2 of 3 workers are started. More lanes" in caplog.text
    assert contents(loader) == contents(stream_loader(shards, RECIPE, num_lanes=2))
