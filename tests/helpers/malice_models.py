"""Model folders and training runs: names of classes and of files in JSON, and headers of safetensors."""

import json
import os
import shutil
import struct

import torch

from helpers.malice import FILE, FOLDER, RUN, attack, png, reseal, run_exec
from mocohub.files import read_json, sha256, write_json


def copy(site, path):
    """A harmless model at `path`."""
    return shutil.copytree(site.model, path)


# Readers of the encoder ask the manifest which network it is; from config.json they take the preprocessing.
ENCODER = ("read_encoder", "inspect", "convert", "export")


def config(name, change, readers=FOLDER, harmless_to=()):
    """A model whose config.json is changed: `change` returns, from the content, the new content or text."""

    def write(site, path):
        copy(site, path)
        changed = change(read_json(path / "config.json"))
        text = changed if isinstance(changed, str | bytes) else json.dumps(changed)
        (path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        reseal(path)

    attack(name, readers, "model", harmless_to)(write)


def manifest(name, change, readers=FOLDER, harmless_to=()):
    """A model whose mocohub.json is changed after it was sealed."""

    def write(site, path):
        copy(site, path)
        changed = change(read_json(path / "mocohub.json"))
        (path / "mocohub.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))

    attack(name, readers, "model", harmless_to)(write)


def pretrained(**changes):
    return lambda c: c | {"pretrained_cfg": c["pretrained_cfg"] | changes}


DEEP = "[" * 100_000 + "]" * 100_000
EVIL = "../outside/evil.pth"  # from the readers' working directory
ELSEWHERE = "../../../outside/model.safetensors"

for what, value in (
    ("a class path", "evil.Network"),
    ("on the Hub", "hf-hub:evil/model"),
    ("a folder outside", "local-dir:../../../outside"),
    ("a list", ["resnet50"]),
    ("missing", None),
):
    config(f"architecture is {what}", lambda c, v=value: c | {"architecture": v}, harmless_to=ENCODER)
for what, value in (
    ("name a class", {"block": "evil.Block"}),
    ("name a function", {"norm_layer": "evil.run"}),
    ("name a checkpoint", {"checkpoint_path": EVIL}),
    ("overlay the weights' place", {"pretrained_cfg_overlay": {"file": EVIL}}),
    ("of a petabyte", {"channels": [1 << 20] * 4}),
    ("are a list", ["resnet50"]),
):
    config(f"arguments {what}", lambda c, v=value: c | {"model_args": v}, harmless_to=ENCODER)
for what, changes in (
    ("weights at a URL", {"url": "http://127.0.0.1:9/evil.pth", "hf_hub_id": "evil/model"}),
    ("weights in a file outside", {"file": EVIL, "source": "file"}),
    ("custom code to load weights", {"custom_load": True}),
):
    config(what, pretrained(**changes), (*FILE, "verify"), harmless_to=FOLDER)
config(
    "code by auto_map",
    lambda c: c | {"auto_map": {"AutoModel": "evil.Network"}, "trust_remote_code": True},
    (*FILE, "verify"),
    harmless_to=FOLDER,
)
config(
    "preprocessing is a class path",
    pretrained(interpolation="evil.Resize", mean="evil.mean"),
    harmless_to=("load", "read_encoder", "inspect", "convert"),
)
config("pretrained_cfg is a string", lambda c: c | {"pretrained_cfg": "evil"})
config("config.json is a list", lambda c: [c])
config("config.json is nested too deep", lambda c: DEEP)
config("config.json has a number of a million digits", lambda c: '{"architecture": ' + "9" * 1_000_000 + "}")
config("config.json is not UTF-8", lambda c: b'{"architecture": "\xff"}')
config("config.json is cut", lambda c: json.dumps(c)[:-20])
config(
    "config.json says it twice",
    lambda c: json.dumps(c)[:-1] + ', "architecture": "evil.Network"}',
    harmless_to=ENCODER,
)

manifest("manifest names files outside", lambda m: m | {"sha256": {ELSEWHERE: "0" * 64}})
manifest("manifest is a list", lambda m: [m])
manifest("manifest is nested too deep", lambda m: DEEP)
manifest("manifest has no hashes", lambda m: {k: v for k, v in m.items() if k != "sha256"})
manifest("manifest's hashes are a list", lambda m: m | {"sha256": ["model.safetensors"]})
manifest(
    "manifest is of a later format", lambda m: m | {"format": "mocohub-export/99"}, harmless_to=("load",)
)
manifest(
    "manifest's name leads outside",
    lambda m: m | {"name": "../../../canaries/x", "license": "../x"},
    harmless_to=(*FILE,),
)
manifest(
    "manifest's backbone is a class path",
    lambda m: m | {"backbone": "evil.Network", "architecture": "evil.Network", "model_args": {"evil": 1}},
    harmless_to=("load",),
)
for what, change in (
    ("architecture is on the Hub", {"architecture": "hf-hub:evil/model"}),
    ("architecture is a folder outside", {"architecture": "local-dir:../../../outside"}),
    ("arguments name a checkpoint", {"model_args": {"checkpoint_path": EVIL}}),
    (
        "arguments ask for weights",
        {"model_args": {"pretrained": True, "pretrained_cfg": {"file": EVIL}}},
    ),
):
    manifest(f"manifest's {what}", lambda m, c=change: m | c, harmless_to=("load",))


@attack("shard index leads outside", FOLDER, "model")
def _(site, path):
    copy(site, path)
    names = {"weight_map": {"conv1.weight": ELSEWHERE}, "metadata": {}}
    write_json(path / "model.safetensors.index.json", names)
    (path / "model.safetensors").unlink()


@attack("index of pickles", FOLDER, "model")
def _(site, path):
    copy(site, path)
    write_json(path / "pytorch_model.bin.index.json", {"weight_map": {"conv1.weight": "pytorch_model-1.bin"}})
    torch.save({"conv1.weight": run_exec(site, path)}, path / "pytorch_model-1.bin")
    (path / "model.safetensors").unlink()


@attack("pickle instead of safetensors", FOLDER, "model")
def _(site, path):
    copy(site, path)
    (path / "model.safetensors").unlink()
    (path / "mocohub.json").unlink()
    torch.save(run_exec(site, path), path / "pytorch_model.bin")


@attack("pickle beside safetensors", FOLDER, "model", harmless_to=FILE)
def _(site, path):
    torch.save(run_exec(site, path), copy(site, path) / "pytorch_model.bin")


@attack("code beside safetensors", FOLDER, "model", harmless_to=FILE)
def _(site, path):
    copy(site, path)
    for name in ("modeling.py", "setup.py", "conftest.py", "__init__.py"):
        (path / name).write_text("import evil\n")


@attack("README runs code by YAML", FOLDER, "model", harmless_to=FILE)
def _(site, path):
    command = f"touch {site.canaries}/yaml"
    text = f"---\nlicense: !!python/object/apply:os.system ['{command}']\n---\n# A model\n"
    (copy(site, path) / "README.md").write_text(text)


@attack("README swells to gigabytes by YAML", FOLDER, "model", harmless_to=FILE)
def _(site, path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    text = "---\n" + "\n".join([*lines, "license: mit", "tags: *a9"]) + "\n---\n# A model\n"
    (copy(site, path) / "README.md").write_text(text)


@attack("README is a link to a file outside", FOLDER, "model", harmless_to=FILE)
def _(site, path):
    copy(site, path)
    (path / "README.md").unlink()
    (path / "README.md").symlink_to(site.outside / "secret.txt")


@attack("config.json is a pipe", FOLDER, "model")
def _(site, path):
    copy(site, path)
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")


# -- safetensors ---------------------------------------------------------------------------------------------


def header(name, change, direct=True):
    """Weights with another header, in a model that vouches for them, and as a file of their own.

    `change` gets the header and the data and returns both; a header of bytes is taken as it is, and an int
    before it is the length that is stated instead of its own.
    """

    def raw(site):
        text = (site.model / "model.safetensors").read_bytes()
        size = int.from_bytes(text[:8], "little")
        made, data = change(json.loads(text[8 : 8 + size]), text[8 + size :])
        stated, made = made if isinstance(made, tuple) else (None, made)
        made = made if isinstance(made, bytes) else json.dumps(made).encode()
        return struct.pack("<Q", len(made) if stated is None else stated) + made + data

    def folder(site, path):
        copy(site, path)
        (path / "model.safetensors").write_bytes(raw(site))
        reseal(path)

    attack(f"safetensors: {name}", FOLDER, "model")(folder)
    if direct:
        attack(f"safetensors file: {name}", FILE, "weights.safetensors")(lambda s, p: p.write_bytes(raw(s)))


def first(h, **changes):
    """The header with changes to its first tensor of four dimensions."""
    name = next(key for key, facts in h.items() if len(facts.get("shape", ())) == 4)
    return h | {name: h[name] | changes}


def overlapping(h):
    names = [key for key in h if key != "__metadata__"]
    same = [n for n in names if h[n]["shape"] == h[names[1]]["shape"]]
    return h | {same[1]: h[same[1]] | {"data_offsets": h[same[0]]["data_offsets"]}}


header("length of 8 exabytes", lambda h, d: ((1 << 63, json.dumps(h).encode()), d))
header("length of 99 MB in a small file", lambda h, d: ((99_000_000, json.dumps(h).encode()), d))
header("length of zero", lambda h, d: ((0, b""), d), direct=False)
header("negative offsets", lambda h, d: (first(h, data_offsets=[-8, 0]), d))
header("offsets behind the end", lambda h, d: (first(h, data_offsets=[0, 1 << 40]), d))
header("overlapping tensors", lambda h, d: (overlapping(h), d))
header("a hole between tensors", lambda h, d: (first(h, data_offsets=[4, 8], shape=[1]), d), direct=False)
header(
    "one name twice",
    lambda h, d: (json.dumps(h)[:-1].encode() + b", " + json.dumps(first(h))[1:].encode(), d),
)
header("shape that overflows", lambda h, d: (first(h, shape=[1 << 62, 1 << 62]), d))
header("negative shape", lambda h, d: (first(h, shape=[-1]), d), direct=False)
header("type that is none", lambda h, d: (first(h, dtype="PICKLE"), d), direct=False)
header("type of another size", lambda h, d: (first(h, dtype="F64"), d), direct=False)
header("nested too deep", lambda h, d: (f'{{"x": {DEEP}}}'.encode(), d))
header("no JSON", lambda h, d: (b"\x80\x02cos\nsystem\n.", d))
header(
    "metadata that are no strings", lambda h, d: (h | {"__metadata__": {"format": {"a": 1}}}, d), direct=False
)
header(
    "names that lead outside",
    lambda h, d: ({(k if k == "__metadata__" else f"../../{k}"): v for k, v in h.items()}, d),
)
header("cut in its data", lambda h, d: (h, d[:-9]))
header("nothing at all", lambda h, d: ((0, b""), b""), direct=False)


# -- training runs -------------------------------------------------------------------------------------------


def run(name, change, harmless_to=()):
    """A run whose newest state.json is changed: given its content, it returns the content or the text."""

    def write(site, path):
        shutil.copytree(site.run, path)
        (folder,) = (path / "checkpoints").iterdir()
        state = read_json(folder / "state.json")
        changed = change(state)
        (folder / "state.json").write_text(changed if isinstance(changed, str) else json.dumps(changed))

    attack(name, RUN, "run", harmless_to)(write)


def recipe(**changes):
    return lambda s: s | {"recipe": s["recipe"] | changes}


run("run: backbone is a class path", recipe(backbone="evil.Network"))
run("run: arguments name a class", recipe(model_args={"block": "evil.Block"}))
run(
    "run: arguments name a checkpoint",
    recipe(model_args={"checkpoint_path": EVIL}),
)
run("run: arguments of a petabyte", recipe(model_args={"channels": [1 << 20] * 4}))
run("run: recipe is a list", lambda s: s | {"recipe": ["evil"]})
run("run: recipe is missing", lambda s: {k: v for k, v in s.items() if k != "recipe"})
run("run: step leads outside", lambda s: s | {"step": "../../../canaries/x"}, harmless_to=RUN)
run(
    "run: hashes of files outside",
    lambda s: s | {"sha256": {"../../../../outside/model.safetensors": "0" * 64}},
)
run("run: state nested too deep", lambda s: DEEP)
run("run: state is a list", lambda s: [s])
run("run: state of a later format", lambda s: s | {"format": "mocohub-checkpoint/99"})


@attack("run: pickles instead of tensors", RUN, "run")
def _(site, path):
    import torch

    shutil.copytree(site.run, path)
    (folder,) = (path / "checkpoints").iterdir()
    torch.save(run_exec(site, path), folder / "state.safetensors")
    state = read_json(folder / "state.json")
    write_json(
        folder / "state.json", state | {"sha256": {"state.safetensors": sha256(folder / "state.safetensors")}}
    )


@attack("run: checkpoint is a link outside", RUN, "run")
def _(site, path):
    shutil.copytree(site.run, path)
    (folder,) = (path / "checkpoints").iterdir()
    shutil.rmtree(folder)
    folder.symlink_to(site.outside)


@attack("an image instead of a model", FILE, "model.safetensors")
def _(site, path):
    path.write_bytes(png())
