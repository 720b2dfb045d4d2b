"""Pickles in every container in which checkpoints come."""

import argparse
import collections
import io
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from helpers.malice import (
    FEATURES,
    FILE,
    FOLDER,
    Payload,
    attack,
    run_exec,
    run_system,
    touch,
    write_tar,
    write_zip,
)
from mocohub.files import sha256, write_json


@attack("pickle in a pth", FILE, "moco.pth")
def _(site, path):
    torch.save({"state_dict": run_system(site, path)}, path)


@attack("pickle beside good tensors", FILE, "moco.pth.tar")
def _(site, path):
    torch.save({"epoch": 1, "state_dict": site.tensors, "optimizer": [run_exec(site, path)]}, path)


@attack("pickle among the tensors", FILE, "model.pt")
def _(site, path):
    torch.save({"state_dict": {**site.tensors, "module.encoder_q.extra": run_exec(site, path)}}, path)


@attack("pickle as a key", FILE, "last.ckpt")
def _(site, path):
    class Key(Payload):
        __hash__ = object.__hash__

    torch.save({"state_dict": site.tensors, Key(exec, touch(site, path)): 1}, path)


@attack("pickle before zip files", FILE, "pytorch_model.bin")
def _(site, path):
    torch.save({"state_dict": run_exec(site, path)}, path, _use_new_zipfile_serialization=False)


@attack("pickle in torch's tar format", FILE, "old.pth.tar")
def _(site, path):
    evil = pickle.dumps(run_system(site, path))
    write_tar(path, {name: evil for name in ("sys_info", "storages", "tensors", "pickle")})


@attack("bare pickle of detectron2", FILE, "R-50.pkl")
def _(site, path):
    path.write_bytes(pickle.dumps({"model": {"stem.conv1.weight": run_exec(site, path)}}))


@attack("bare pickle of protocol 0", FILE, "model.pth")
def _(site, path):
    path.write_bytes(f"cos\nsystem\n(S\"touch '{site.canaries / path.parent.name}'\"\ntR.".encode())


@attack("bare pickle with INST", FILE, "model.pkl")
def _(site, path):
    path.write_bytes(f"(S\"touch '{site.canaries / path.parent.name}'\"\nios\nsystem\n.".encode())


@attack("bare pickle of protocol 4", FILE, "model.torch")
def _(site, path):
    path.write_bytes(pickle.dumps([run_exec(site, path), 1], protocol=4))


@attack("pickle in a pickle by torch's own loader", FILE, "model.pth")
def _(site, path):
    inner = io.BytesIO()
    torch.save(run_exec(site, path), inner)
    torch.save({"state_dict": Payload(torch.storage._load_from_bytes, inner.getvalue())}, path)


@attack("pickle that imports a module", FILE, "model.pth")
def _(site, path):
    path.write_bytes(b"\x80\x02cevil\nNetwork\n)R.")


@attack("pickle that sets attributes of an allowed type", FILE, "model.pth")
def _(site, path):
    ordered = collections.OrderedDict(site.tensors)
    ordered._metadata = run_exec(site, path)
    torch.save({"state_dict": ordered}, path)


@attack("pickle inside argparse's Namespace", FILE, "model.pth")
def _(site, path):
    torch.save({"state_dict": site.tensors, "opt": argparse.Namespace(lr=run_exec(site, path))}, path)


@attack("two pickles of one name in a zip", FILE, "model.pth")
def _(site, path):
    torch.save({"state_dict": site.tensors}, path)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings(action="ignore"):
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        archive.writestr(name, pickle.dumps(run_system(site, path), protocol=2))


@attack("zip whose storage is outside of it", FILE, "model.pth")
def _(site, path):
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(4)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(n for n in members if n.endswith("data.pkl"))
    target = f"../../../../../../..{site.outside}/model.safetensors".encode()
    members[name] = members[name].replace(b"X\x01\0\0\0000", b"X" + struct.pack("<I", len(target)) + target)
    assert target in members[name]
    write_zip(path, members)


@attack("tensor larger than its storage", FILE, "model.pth")
def _(site, path):
    data = torch.zeros(4).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=data, dtype=torch.float32, _internal=True)
    wide = Payload(torch._utils._rebuild_tensor_v2, storage, 0, (1 << 40,), (1,), False, {})
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": wide}}, path)


@attack("TorchScript archive", FILE, "model.pt")
def _(site, path):
    code = b"class Net(Module):\n  __parameters__ = []\n  def forward(self) -> None:\n    return None\n"
    members = {"data.pkl": b"\x80\x02c__torch__\nNet\n)\x81.", "code/__torch__.py": code}
    members |= {"constants.pkl": pickle.dumps((run_exec(site, path),), protocol=2), "version": b"3\n"}
    write_zip(path, {f"model/{name}": data for name, data in members.items()})


@attack("zip with names outside", FILE, "model.pth")
def _(site, path):
    write_zip(path, {"../../../canaries/zip": b"x", str(site.canaries / "zip2"): b"x", "a/data.pkl": b"N."})


@attack("pickle under the name of safetensors", FILE, "model.safetensors")
def _(site, path):
    torch.save({"state_dict": run_exec(site, path)}, path)


@attack("npy of objects", (*FILE, "list_images"), "features.npy")
def _(site, path):
    np.save(path, np.array([run_exec(site, path)], dtype=object), allow_pickle=True)


@attack("npz of objects", (*FILE, "list_images"), "model.npz.pth")
def _(site, path):
    np.savez(path.with_suffix(""), a=np.array([run_system(site, path)], dtype=object))
    path.with_suffix("").rename(path)


@attack("distributed checkpoint", FOLDER, "dcp")
def _(site, path):
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(run_exec(site, path)))
    torch.save(run_exec(site, path), path / "__0_0.distcp")


@attack("features with a pickled type", FEATURES, "features")
def _(site, path):
    path.mkdir()
    evil = {"ARROW:extension:name": "arrow.py_extension_type"}
    evil["ARROW:extension:metadata"] = pickle.dumps(run_exec(site, path))
    field = pa.field("embedding", pa.list_(pa.float32(), 2), metadata=evil)
    rows = {"id": [0], "path": ["a"], "label": [None], "embedding": [[1.0, 2.0]]}
    plain = [pa.field("id", pa.int64()), pa.field("path", pa.string()), pa.field("label", pa.int64())]
    pq.write_table(pa.table(rows, schema=pa.schema([*plain, field])), path / "part-00000-of-00001.parquet")
    _seal_features(path, "part-00000-of-00001.parquet")


@attack("features outside their folder", FEATURES, "features")
def _(site, path):
    path.mkdir()
    pq.write_table(pa.table({"id": [0]}), site.outside / "part.parquet")
    _seal_features(path, os.path.relpath(site.outside / "part.parquet", path))


def _seal_features(folder: Path, file: str) -> None:
    shard = {"file": file, "rows": 1, "sha256": sha256(folder / file)}
    facts = {
        "format": "mocohub-features/1",
        "num_features": 2,
        "dtype": "float32",
        "classes": None,
        "meta": {},
    }
    write_json(folder / "manifest.json", {**facts, "rows": 1, "errors": 0, "shards": [shard]})
    (folder / "errors.jsonl").write_text("")
