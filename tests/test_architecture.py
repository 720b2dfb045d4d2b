"""Imports point one way: what a module may import is what stands left of it."""

import ast
from pathlib import Path

import mocohub

ROOT = Path(mocohub.__file__).parent
COMMON = ["errors", "files", "images", "classes", "lists", "tars", "tar_index", "sources"]
COMMON += ["shard_reader", "shards", "backbones", "distributed", "memory"]
ORDER = [
    COMMON,
    ["probes"],
    ["hub"],
    ["features"],
    ["pretrain"],
    ["evaluation"],
    ["report", "plot"],
    ["demo"],
    ["cli", "__main__"],
]
ROOM = {name: i for i, names in enumerate(ORDER) for name in names}


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {m.split(".")[1] for m in modules if m.startswith("mocohub.")}
    return rooms & ROOM.keys()


def test_every_module_has_its_place_and_imports_only_from_its_left() -> None:
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).with_suffix("").parts[0]
        if room == "__init__":
            continue  # names the public functions, imports them on first use
        assert room in ROOM, f"{path} has no place in the order of imports"
        wrong = {other for other in imported_rooms(path) if ROOM[other] > ROOM[room]}
        assert not wrong, f"{path} imports from {wrong}, which come after it"
