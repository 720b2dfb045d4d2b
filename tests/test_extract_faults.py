"""Extractions that are killed, shared by several processes, or meet a folder that is not theirs."""

import errno
import gzip
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms

from mocohub.features import job as jobs
from mocohub.features import plan as plans
from mocohub.features import rows as row_makers
from mocohub.features.extract import extract, write_plan
from mocohub.features.identity import contents_sha256
from mocohub.features.store import Features
from mocohub.files import read_json, sha256
from tests.helpers.faults import (
    FAIL_FROM_THERE,
    FAIL_ONCE,
    at_every_operation,
    with_counted_file_operations,
)
from tests.helpers.images import write_images
from tests.helpers.shards import make_tar, tar_bytes

FORK = multiprocessing.get_context("fork")
CHANGES = ("open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir")


class Colours(nn.Module):
    """Mean and variance of each channel, as slowly as wanted."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)
        return torch.cat([x.mean((2, 3)), x.var((2, 3))], 1)


OPTIONS = {
    "batch_size": 2,
    "rows_per_shard": 5,
    "num_workers": 0,
    "transform": transforms.ToTensor(),
    "dtype": "float32",
    "progress": False,
}


@pytest.fixture
def photos(tmp_path):
    folder = write_images(tmp_path / "photos", {"cat": 13, "dog": 10}, size_px=8)
    (folder / "cat/0007.png").write_bytes(b"no image")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def tars(photos, tmp_path):
    """The same images in three tars: 13 of cats, no more than a row group; 9 of dogs; one that is cut."""
    folder = tmp_path / "tars"
    folder.mkdir()
    files = {path.relative_to(photos).as_posix(): path.read_bytes() for path in sorted(photos.rglob("*.png"))}
    dogs = {name: data for name, data in files.items() if name.startswith("dog")}
    make_tar(folder / "0.tar", {name: data for name, data in files.items() if name.startswith("cat")})
    make_tar(folder / "1.tar", dogs)
    make_tar(folder / "2.tar", dogs)
    (folder / "2.tar").write_bytes((folder / "2.tar").read_bytes()[:-9000])
    return folder


@pytest.fixture(params=["files", "tars"])
def source(request, photos, tars):
    return photos if request.param == "files" else tars


@pytest.fixture
def undisturbed(source, tmp_path):
    """The files that an extraction of the source leaves which nothing disturbs."""
    extract(Colours(), source, out=tmp_path / "undisturbed", **OPTIONS)
    return contents(tmp_path / "undisturbed")


@pytest.fixture
def expected(photos, tmp_path):
    """The files that an extraction leaves which nothing disturbs."""
    extract(Colours(), photos, out=tmp_path / "undisturbed", **OPTIONS)
    return contents(tmp_path / "undisturbed")


def start(photos, out, *, kill_at=None, seconds=0.0, **options):
    """Extract in a process of its own, which kills itself before the n-th change of the folder."""

    def work():
        num_changes = 0

        def watch(event, args):
            nonlocal num_changes
            if (
                event in CHANGES
                and str(out) in str(args[0])
                and (event != "open" or "r" not in (args[1] or "r"))
            ):
                num_changes += 1
                if num_changes == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        extract(Colours(seconds), photos, out=out, **{**OPTIONS, **options})

    process = FORK.Process(target=work)
    process.start()
    return process


@pytest.mark.parametrize(
    ("source", "shard"), [("files", "0/1"), ("files", "lease"), ("tars", "lease")], indirect=["source"]
)
def test_killed_at_any_change_of_the_folder_it_goes_on_to_the_same_bytes(
    source, tmp_path, undisturbed, shard
):
    for kill_at in range(1, 1000):
        out = tmp_path / str(kill_at)
        process = start(source, out, kill_at=kill_at, shard=shard)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        extract(Colours(), source, out=out, shard=shard, **OPTIONS)
        assert contents(out) == undisturbed, kill_at
    assert kill_at > 24  # three shards or five, each of several steps
    assert contents(out) == undisturbed


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_workers_that_are_killed_and_started_again_leave_the_same_bytes(
    source, tmp_path, undisturbed, num_workers
):
    chance = random.Random(num_workers)
    kills = 0
    for round_ in range(100):
        out = tmp_path / f"features-{round_}"
        workers = []
        while not (out / "manifest.json").is_file():
            workers = [worker for worker in workers if worker.is_alive()]
            while len(workers) < num_workers:
                workers.append(start(source, out, seconds=0.05, shard="lease"))
            time.sleep(chance.uniform(0.1, 0.3))
            if kills < 5:
                chance.choice(workers).kill()  # not by its number, which is free once it has ended
                kills += 1
        for worker in workers:
            worker.join()
        extract(Colours(), source, out=out, **OPTIONS)  # one may have been killed while it tidied up
        assert contents(out) == undisturbed
        if kills == 5:  # 20 with all numbers of workers
            return


def test_two_workers_on_the_same_shards_leave_the_same_bytes(source, tmp_path, undisturbed):
    out = tmp_path / "features"
    workers = [start(source, out, seconds=0.01 * i, shard="0/1") for i in (1, 1, 2)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert contents(out) == undisturbed


def test_each_of_n_workers_does_its_share_and_the_last_writes_the_manifest(photos, tmp_path, expected):
    out = tmp_path / "features"
    for i in range(3):
        assert not (out / "manifest.json").exists()
        features = extract(Colours(), photos, out=out, shard=f"{i}/3", **OPTIONS)
        shards = sorted({id // 5 for id in [*features.ids.tolist(), *(e["id"] for e in features.errors)]})
        assert shards == ([0, 3], [1, 4], [0, 1, 2, 3, 4])[i]
    assert contents(out) == expected


@pytest.mark.parametrize(
    "ranks",
    [
        [{"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}],
        [
            {
                "SLURM_ARRAY_TASK_ID": str(i),
                "SLURM_ARRAY_TASK_COUNT": "2",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_STEP": "2",
            }
            for i in (3, 5)
        ],
    ],
)
def test_torchrun_and_slurm_say_which_share(photos, tmp_path, expected, ranks, monkeypatch):
    for environ in ranks:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        extract(Colours(), photos, out=tmp_path / "features", **OPTIONS)
    assert contents(tmp_path / "features") == expected


def test_what_is_done_is_not_computed_again(photos, tmp_path, expected):
    class Counting(Colours):
        num_images = 0

        def forward(self, x):
            self.num_images += len(x)
            return super().forward(x)

    out = tmp_path / "features"
    extract(Colours(), photos, out=out, shard="1/2", **OPTIONS)
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.parquet")}
    model = Counting()
    extract(model, photos, out=out, **OPTIONS)
    assert contents(out) == expected
    assert model.num_images < 23
    assert all((out / name).stat().st_mtime_ns == time_ns for name, time_ns in done.items())

    model.num_images = 0
    features = extract(model, photos, out=out, **OPTIONS)
    assert model.num_images == 0 and len(features) == 22
    np.testing.assert_array_equal(features.values, Features.open(tmp_path / "undisturbed").values)


def test_a_worker_that_starts_while_others_finish_is_done(photos, tmp_path, expected, monkeypatch):
    out, look = tmp_path / "features", jobs.sample

    def slow_look(*args, **options):
        monkeypatch.undo()
        extract(Colours(), photos, out=out, **OPTIONS)
        return look(*args, **options)

    extract(Colours(), photos, out=out, shard="0/2", **OPTIONS)
    monkeypatch.setattr(jobs, "sample", slow_look)
    features = extract(Colours(), photos, out=out, **OPTIONS)
    assert len(features) == 22 and contents(out) == expected


def test_a_worker_that_ends_while_others_finish_is_done(photos, tmp_path, expected, monkeypatch):
    out, records = tmp_path / "features", plans.Plan.records

    def slow_records(plan, shards):
        monkeypatch.undo()
        extract(Colours(), photos, out=out, shard="1/2", **OPTIONS)
        return records(plan, shards)

    monkeypatch.setattr(plans.Plan, "records", slow_records)
    features = extract(Colours(), photos, out=out, shard="0/2", **OPTIONS)
    assert len(features) == 22 and contents(out) == expected


def test_a_plan_alone_is_joined_by_workers(photos, tmp_path, expected):
    out = tmp_path / "features"
    file = write_plan(Colours(), photos, out=out, **OPTIONS)
    assert read_json(file)["num_shards"] == 5 and not list(out.glob("*.parquet"))
    extract(Colours(), photos, out=out, **OPTIONS)
    assert contents(out) == expected


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": nn.Sequential(nn.Conv2d(3, 4, 1), Colours())}, r"meta.model.weights_sha256: '\w+' there"),
        ({"transform": transforms.Compose([transforms.ToTensor()])}, "meta.transform.text: 'ToTensor"),
        ({"images": "other"}, "meta.input.paths_sha256"),
        ({"images": "fewer"}, "num_inputs: 23 there, 13 here"),
        ({"rows_per_shard": 6}, "rows_per_shard: 5 there, 6 here"),
        ({"normalize": True}, "meta.normalized: False there, True here"),
        ({"flip": True}, "meta.flip: False there, True here"),
        ({"batch_size": 3}, "batch_size: 2 there, 3 here"),
        ({"output_dtype": "float16"}, "output_dtype: 'float32' there, 'float16' here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_extraction_is_not_mixed_in(photos, tmp_path, change, message, finished):
    extract(Colours(), photos, out=tmp_path / "features", shard="0/1" if finished else "0/2", **OPTIONS)
    before = contents(tmp_path / "features")
    arguments = {"model": Colours(), "images": photos, **OPTIONS, **change}
    if change.get("images") == "other":
        (photos / "cat/0003.png").rename(photos / "cat/zebra.png")
    if "images" in change:
        arguments["images"] = photos / "cat" if change["images"] == "fewer" else photos
    with pytest.raises(ValueError, match=f"(?s)begun with other settings.*{message}.*Choose another --out"):
        extract(out=tmp_path / "features", **arguments)
    assert contents(tmp_path / "features") == before


FACTOR, STEPS = 1.0, transforms.ToTensor()


def preprocessing(scale, offset=0.0):
    def preprocess(image, power=1):
        assert image.mode in {"RGB", "RGBA", "L"}
        return STEPS(image) ** power * scale * FACTOR + offset

    return preprocess


def test_a_function_that_preprocesses_otherwise_is_not_mixed_in(photos, tmp_path, monkeypatch):
    out, options = tmp_path / "features", {name: OPTIONS[name] for name in OPTIONS if name != "transform"}
    extract(Colours(), photos, out=out, shard="0/2", transform=preprocessing(1.0), **options)
    others = {"closure": preprocessing(2.0), "default": preprocessing(1.0), "global": preprocessing(1.0)}
    others["default"].__defaults__ = (2,)
    others["code"] = lambda image: STEPS(image) / 2
    others["code"].__qualname__ = preprocessing(1.0).__qualname__
    for change, other in others.items():
        with monkeypatch.context() as patch:
            if change == "global":
                patch.setitem(globals(), "FACTOR", 2.0)
            with pytest.raises(ValueError, match=r"transform_code_sha256: '\w+' there"):
                extract(Colours(), photos, out=out, transform=other, **options)
    extract(Colours(), photos, out=out, transform=preprocessing(1.0), **options)
    assert len(Features.open(out)) == 22


def test_the_code_of_a_function_is_the_same_in_every_process():
    script = "from tests.test_extract_faults import *; from mocohub.features import views\n"
    script += "print(views.code_sha256(preprocessing(1.0)), views.code_sha256(transforms.ToTensor()))"
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for seed in (1, 2)
    ]
    assert runs[0] == runs[1] and len(runs[0][0]) == 64 and runs[0][1] == "None"


def test_other_labels_of_the_same_paths_are_not_mixed_in(photos, tmp_path):
    lists = []
    for name, labels in (("a.tsv", "ab"), ("b.tsv", "ba")):
        lists.append(tmp_path / name)
        rows = [f"photos/{label}/0000.png\t{c}" for label, c in zip(("cat", "dog"), labels, strict=True)]
        lists[-1].write_text("\n".join(["path\tlabel", *rows]))
    options = {**OPTIONS, "rows_per_shard": 1, "out": tmp_path / "features"}
    extract(Colours(), lists[0], shard="0/2", **options)
    with pytest.raises(ValueError, match="input_fingerprint: "):
        extract(Colours(), lists[1], **options)


class Squares(Dataset):
    """Images of one colour each, and a label."""

    def __init__(self, offset=0, is_random=False):
        self.offset, self.is_random = offset, is_random

    def __len__(self):
        return 11

    def __getitem__(self, i):
        pixels = torch.rand(3, 8, 8) if self.is_random else torch.full((3, 8, 8), (i + self.offset) / 100)
        return pixels, i


NOISE = np.random.default_rng(0).integers(0, 256, (11, 200, 200, 3), np.uint8)


@pytest.mark.parametrize(
    "make",
    [
        lambda offset: NOISE + np.uint8(offset),
        lambda offset: [*NOISE[:10], NOISE[10] + np.uint8(offset)],
        lambda offset: [Image.fromarray(array) for array in NOISE + np.uint8(offset)],
        lambda offset: [Image.open(io.BytesIO(png(i))) for i in range(offset, offset + 7)],
        lambda offset: torch.from_numpy(NOISE).permute(0, 3, 1, 2).bfloat16() / 300 + offset,
        Squares,
        lambda offset: torch.utils.data.Subset(Squares(), range(offset, offset + 7)),
    ],
)
def test_as_many_other_images_of_a_program_are_not_mixed_in(tmp_path, make):
    out = tmp_path / "features"
    first = extract(Colours(), make(0), out=out, shard="0/2", **OPTIONS)
    again = extract(Colours(), make(0), out=out, **OPTIONS)
    assert len(again) > len(first)
    with pytest.raises(ValueError, match="input_fingerprint: .* there, .* here"):
        extract(Colours(), make(1), out=out, **OPTIONS)


def test_a_dataset_with_random_items_is_gone_on_with(tmp_path):
    for shard in ("0/2", "1/2"):
        features = extract(Colours(), Squares(is_random=True), out=tmp_path / "out", shard=shard, **OPTIONS)
    assert len(features) == 11


def test_images_that_are_not_loaded_yet_are_known_by_their_files(photos):
    images = [Image.open(path) for path in sorted(photos.glob("dog/*.png"))]
    before = contents_sha256(images, in_memory=True)
    assert all(image.fp is not None for image in images)  # Pillow closes those it has loaded
    assert before != contents_sha256(images[::-1], in_memory=True)


def test_a_worker_that_would_compute_otherwise_is_refused(photos, tmp_path):
    out = tmp_path / "features"
    extract(Colours(), photos, out=out, shard="0/2", **OPTIONS)
    computation = read_json(out / "progress/computation.json")
    computation["versions"]["torch"] = "1.0"
    (out / "progress/computation.json").unlink()
    plans.write_json(out / "progress/computation.json", computation)
    with pytest.raises(ValueError, match="versions.torch: '1.0' there"):
        extract(Colours(), photos, out=out, **OPTIONS)


def test_a_full_disk_is_an_error_and_the_next_call_goes_on(photos, tmp_path, expected, monkeypatch):
    out = tmp_path / "features"
    flush, calls = plans.flush, 0

    def full(path):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        flush(path)

    monkeypatch.setattr(plans, "flush", full)
    with pytest.raises(OSError, match=f"No space left.*'{out}' cannot be written. Make room there"):
        extract(Colours(), photos, out=out, **OPTIONS)
    monkeypatch.undo()
    assert not (out / "manifest.json").exists() and not list((out / "progress").glob(".*.partial"))
    extract(Colours(), photos, out=out, **OPTIONS)
    assert contents(out) == expected


@pytest.mark.parametrize("do", [extract, write_plan])
def test_an_output_that_cannot_be_written_is_named_with_the_remedy(photos, do):
    out = photos / "cat/0000.png/features"
    with pytest.raises(OSError, match=f"'{out}' cannot be written. Choose another --out"):
        do(Colours(), photos, out=out, **OPTIONS)


def each_failing_operation_of_an_extraction(tmp_path, source, mode):
    torch.set_num_threads(1)
    extract(Colours(), source, out=tmp_path / "expected", **OPTIONS)
    expected, out = contents(tmp_path / "expected"), tmp_path / "out" / "features"
    out.parent.mkdir()

    def work():
        try:
            extract(Colours(), source, out=out, **OPTIONS)
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            os._exit(7)

    def check(code):
        assert code in (0, 7), code
        if code == 7:
            assert not (out / "manifest.json").exists() or contents(out).keys() >= expected.keys()
            extract(Colours(), source, out=out, **OPTIONS)
        elif out.exists():  # one that nothing depends on
            extract(Colours(), source, out=out, **OPTIONS)
        assert contents(out) == expected
        codes.append(code)

    codes = []
    count = at_every_operation(mode, out.parent, lambda: shutil.rmtree(out, ignore_errors=True), work, check)
    assert count > 30, f"the faults are not counted: {count}"
    assert codes.count(7) > 0.8 * len(codes)  # the others: what is tidied up may fail


@pytest.mark.parametrize("mode", [FAIL_FROM_THERE, pytest.param(FAIL_ONCE, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_at_any_operation_costs_nothing_that_is_done(tmp_path, mode):
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars/0.tar", {"0.png": png(0), "1.png": png(1)})
    (tmp_path / "tars/1.tar").write_bytes(tar_bytes({"2.png": png(2), "3.png": png(3)})[:1500])
    with_counted_file_operations(
        tmp_path, each_failing_operation_of_an_extraction, tmp_path, tmp_path / "tars", mode
    )


def png(i):
    """About a block or two, of another colour each."""
    file = io.BytesIO()
    Image.new("RGB", (5, 5), (i, 2 * i, 255 - i)).save(file, "PNG")
    return file.getvalue() + bytes(i * 17)  # decoders stop at the end of the picture


def found_in(folder):
    """Rows and errors of an extraction, once every id is known to be in one of the two."""
    features = extract(Colours(), folder, **OPTIONS)
    ids = [*features.ids.tolist(), *(error["id"] for error in features.errors)]
    assert len(set(ids)) == len(ids)
    return features


def test_no_cut_of_a_tar_at_any_block_loses_an_image_silently(tmp_path):
    images = {f"{i:02d}.png": png(i) for i in range(40)}
    whole = tar_bytes(images)
    (tmp_path / "tars").mkdir()
    make_tar(tmp_path / "tars/other.tar", {"other.png": png(50)})
    ends, position = [], 0
    for data in images.values():
        position += 512 + len(data) + -len(data) % 512
        ends.append(position)
    num_silent = num_errors = 0
    for length in range(0, len(whole) + 1, 512):
        (tmp_path / "tars/cut.tar").write_bytes(whole[:length])
        features = found_in(tmp_path / "tars")
        paths = [path for path in features.paths if path.startswith("cut.tar")]
        assert paths == [f"cut.tar/{name}" for name, end in zip(images, ends, strict=True) if end <= length]
        num_silent += len(paths) < 40 and not features.errors
        num_errors += len(features.errors)
        assert all(
            error["path"] == "cut.tar" and "has been cut" in error["reason"] for error in features.errors
        )
    assert num_silent == 0
    assert num_errors == ends[-1] // 512 + 2  # every cut but those in the padding behind the end


def test_hostile_tars_lose_nothing_silently_and_write_nothing_outside(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    make_tar(folder / "other.tar", {"other.png": png(50)})

    def plain(i, name=None, kind=tarfile.REGTYPE):
        info = tarfile.TarInfo(name or f"{i}.png")
        info.type, info.size, info.linkname = (
            kind,
            len(png(i)) if kind == tarfile.REGTYPE else 0,
            "/etc/passwd",
        )
        return info.tobuf(tarfile.GNU_FORMAT) + (png(i) + bytes(-len(png(i)) % 512)) * (info.size > 0)

    def stated(size, kind=tarfile.REGTYPE):
        info = tarfile.TarInfo("1.png")
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT)

    end = bytes(1024)
    flipped = bytearray(plain(0) + plain(1) + plain(2) + end)
    flipped[len(plain(0)) + 3] ^= 1
    inner = gzip.compress(tar_bytes({"0.png": png(0)}) + bytes(64 << 20))  # 64 MB of zeros in 64 KB
    for name, data, rows, reason in (
        ("twice", plain(0, "a.png") + plain(1, "a.png") + end, ["a.png", "a.png"], None),
        ("up", plain(0, "../../up.png") + end, ["../../up.png"], None),
        ("absolute", plain(0, "/tmp/absolute.png") + end, ["tmp/absolute.png"], None),
        (
            "symlink",
            plain(0) + plain(1, kind=tarfile.SYMTYPE) + plain(2) + end,
            ["0.png", "2.png"],
            "'1.png'",
        ),
        ("hard link", plain(0) + plain(1, kind=tarfile.LNKTYPE) + end, ["0.png"], "--hard-dereference"),
        ("device", plain(0) + plain(1, kind=tarfile.CHRTYPE) + end, ["0.png"], "links or devices"),
        ("folder", plain(0) + plain(1, kind=tarfile.DIRTYPE) + end, ["0.png"], None),
        ("sparse", plain(0) + stated(10 << 30, tarfile.GNUTYPE_SPARSE) + end, ["0.png"], "a sparse file"),
        ("flipped header", bytes(flipped), ["0.png"], "the header at byte 1024 is damaged"),
        ("too long", plain(0) + stated(100 << 20) + bytes(5000), ["0.png"], "it has been cut"),
        ("joined", plain(0) + end + plain(1) + end, ["0.png"], "more data follows its end"),
        ("gz bomb", inner, [], "it is compressed: decompress it once"),
        ("no tar", b"nothing of it" * 200, [], "the header at byte 0 is damaged"),
        ("empty", b"", [], "it has been cut"),
        ("no image", tar_bytes({"a.txt": b"a"}), [], "it holds no image"),
    ):
        (folder / "hostile.tar").write_bytes(data)
        before = sorted(tmp_path.rglob("*"))
        features = found_in(folder)
        found = [path.removeprefix("hostile.tar/") for path in features.paths]
        assert found == [*rows, "other.tar/other.png"], name
        assert len(features.errors) == (reason is not None), (name, features.errors)
        for error in features.errors:
            assert error["path"] == "hostile.tar" and reason in error["reason"], (name, error)
        assert sorted(tmp_path.rglob("*")) == before, name
        assert not Path("/tmp/absolute.png").exists()


def test_features_that_are_all_not_finite_are_no_result(photos, tmp_path):
    class Nothing(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) * torch.nan

    with pytest.raises(
        RuntimeError, match=r"None of the 23 images gave features:\n  cat/0000.png: .*not finite"
    ):
        extract(Nothing(), photos, out=tmp_path / "features", **OPTIONS)
    assert not (tmp_path / "features/manifest.json").exists()


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_dedup_computes_each_image_once_and_gives_the_same_rows(photos, tmp_path, batch_size):
    for copy, original in (("cat/0002", "cat/0001"), ("dog/0000", "cat/0001"), ("dog/0008", "dog/0001")):
        (photos / f"{copy}.png").write_bytes((photos / f"{original}.png").read_bytes())
    (photos / "dog/0009.png").write_bytes(b"no image")  # as cat/0007.png

    class Counting(Colours):
        num_images = 0

        def forward(self, x):
            self.num_images += len(x)
            return super().forward(x)

    options = {**OPTIONS, "batch_size": batch_size, "rows_per_shard": 100, "content_hash": True}
    results = []
    for dedup in (False, True):
        model = Counting()
        out = tmp_path / f"dedup-{dedup}"
        results.append(extract(model, photos, out=out, dedup=dedup, **options))
        results.append(extract(Counting(), photos, dedup=dedup, **options))
        sample = min(batch_size, 8) + min(batch_size, 8)  # looked at twice before the start
        assert model.num_images <= (21, 18)[dedup] + 2 * sample
    plain, *others = results
    files = sorted(path for path in photos.rglob("*.png") if path.read_bytes() != b"no image")
    assert plain.extras["content_sha256"] == [sha256(path) for path in files]
    assert plain.extras["width"] == plain.extras["height"] == [8] * 21
    for features in others:
        np.testing.assert_allclose(features.values, plain.values, rtol=1e-6)
        assert features.paths == plain.paths and features.errors == plain.errors
        assert features.labels.tolist() == plain.labels.tolist()
        assert features.extras == plain.extras


def test_dedup_needs_files():
    with pytest.raises(ValueError, match="dedup needs the encoded bytes of files or tar shards"):
        extract(Colours(), np.zeros((2, 8, 8, 3), np.uint8), dedup=True, transform=transforms.ToTensor())


def test_a_shard_keeps_only_what_is_still_needed():
    """The rows of repeated images wait for their last repetition, and no longer."""
    hashes = ["a", "b", "a", "c", "b", None, None]
    shard = row_makers.Shard(0, range(10, 17), hashes)
    assert shard.distinct == [10, 11, 13, 15, 16]
    assert list(shard.add({10: "A", 11: "B"})) == [(10, "A"), (11, "B"), (12, "A")]
    assert set(shard._found) == {11}
    assert list(shard.add({13: "C", 15: "D"})) == [(13, "C"), (14, "B"), (15, "D")]
    assert not shard._found and not shard.is_finished
    assert list(shard.add({16: "E"})) == [(16, "E")]
    assert shard.is_finished


@pytest.mark.parametrize("given", ["1", "2/2", "a/b", "-1/2", "1/0", ""])
def test_a_share_that_is_none_is_refused(photos, tmp_path, given):
    with pytest.raises(ValueError, match=f"shard is '{given}', but must be 'i/N'"):
        extract(Colours(), photos, out=tmp_path / "features", shard=given, **OPTIONS)
    with pytest.raises(ValueError, match="shard='0/2' needs out="):
        extract(Colours(), photos, shard="0/2", **OPTIONS)


def test_images_that_have_been_mended_are_read_again_on_request_wherever_that_is_killed(photos, tmp_path):
    good = (photos / "dog/0003.png").read_bytes()
    extract(Colours(), photos, out=tmp_path / "undisturbed", **OPTIONS)
    expected = contents(tmp_path / "undisturbed")
    (photos / "dog/0003.png").write_bytes(good[:50])
    features = extract(Colours(), photos, out=tmp_path / "spoilt", **OPTIONS)
    assert [error["path"] for error in features.errors] == ["cat/0007.png", "dog/0003.png"]
    (photos / "dog/0003.png").write_bytes(good)
    before = contents(tmp_path / "spoilt")
    extract(Colours(), photos, out=tmp_path / "spoilt", **OPTIONS)
    assert contents(tmp_path / "spoilt") == before  # nobody said that anything is mended
    for kill_at in range(1, 100):
        out = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "spoilt", out)
        process = start(photos, out, kill_at=kill_at, retry_damaged=True)
        process.join()
        if process.exitcode == 0:
            break
        extract(Colours(), photos, out=out, retry_damaged=True, **OPTIONS)
        assert contents(out) == expected
    assert kill_at > 20 and contents(out) == expected


def test_damaged_shards_are_done_again_on_request_wherever_that_is_killed(photos, tmp_path, expected):
    for kill_at in range(1, 100):
        out = tmp_path / str(kill_at)
        shutil.copytree(tmp_path / "undisturbed", out)
        data = bytearray((out / "part-00002-of-00005.parquet").read_bytes())
        data[len(data) // 2] ^= 1
        (out / "part-00002-of-00005.parquet").write_bytes(data)
        (out / "part-00004-of-00005.parquet").unlink()
        process = start(photos, out, kill_at=kill_at, retry_damaged=True)
        process.join()
        extract(Colours(), photos, out=out, retry_damaged=True, **OPTIONS)
        assert contents(out) == expected, kill_at
        if process.exitcode == 0:
            break
    assert kill_at > 15


def test_images_are_read_again_while_an_extraction_is_under_way(photos, tmp_path, caplog):
    extract(Colours(), photos, out=tmp_path / "undisturbed", **OPTIONS)
    good = (photos / "cat/0001.png").read_bytes()
    (photos / "cat/0001.png").write_bytes(b"")
    extract(Colours(), photos, out=tmp_path / "out", shard="0/2", **OPTIONS)
    (photos / "cat/0001.png").write_bytes(good)
    with caplog.at_level("INFO"):
        extract(Colours(), photos, out=tmp_path / "out", retry_damaged=True, **OPTIONS)
    assert "Reading again what was damaged: cat/0001.png" in caplog.text
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
