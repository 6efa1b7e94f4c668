"""docs/architecture.md says which room may import which, and has a line for every module; the code keeps to it."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

FOLDERS = {"vessel_rt": ROOT / "runtime" / "vessel_rt", "vessel_export": ROOT / "export" / "vessel_export"}
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def rooms(package: str) -> dict[str, set[str]]:
    """What each room of a package may import; rooms of the other package have their whole names."""
    section = DOCUMENT.split(f"\n### Rooms of {package}\n")[1].split("\n#")[0]
    return {room: set(re.findall(r"`([\w.]+)`", cell)) for room, cell in re.findall(r"^\| `(\w+)` \| (.*?) \|", section, re.MULTILINE)}


def modules(package: str) -> dict[str, Path]:
    folder = FOLDERS[package]
    paths = {".".join((package, *path.relative_to(folder).with_suffix("").parts)): path for path in folder.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def imports(path: Path, *, for_types: bool) -> set[str]:
    """The modules of both packages that a file imports anywhere; with `for_types`, those under TYPE_CHECKING too."""
    tree, known = ast.parse(path.read_text(encoding="utf-8")), {name for package in FOLDERS for name in modules(package)}
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = [node for guard in guards for node in guard.body] if not for_types else []
    found = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped:
            assert node.level == 0, f"{path}: a relative import"
            found += [name if (name := f"{node.module}.{alias.name}") in known else str(node.module) for alias in node.names]
    return known & set(found)


@pytest.mark.parametrize("package", FOLDERS)
def test_a_room_imports_only_what_it_may(package: str) -> None:
    allowed = rooms(package)
    for name, path in modules(package).items():
        if name == package:  # the public names, which api and errors define
            assert imports(path, for_types=True) <= {f"{package}.api", f"{package}.errors"}
            continue
        room = name.split(".")[1]
        seen = {".".join(found.split(".")[:2]).removeprefix(f"{package}.") for found in imports(path, for_types=True)}
        assert seen <= allowed[room] | {room, *FOLDERS}, f"{name} imports {seen - allowed[room] - {room}}"


@pytest.mark.parametrize("package", FOLDERS)
def test_no_imports_go_round_in_a_circle(package: str) -> None:
    TopologicalSorter(rooms(package)).prepare()
    TopologicalSorter({name: imports(path, for_types=False) for name, path in modules(package).items()}).prepare()


@pytest.mark.parametrize("package", FOLDERS)
def test_every_module_has_a_line_and_every_room_a_docstring(package: str) -> None:
    section = DOCUMENT.split(f"\n### Modules of {package}\n")[1].split("\n#")[0]
    lines = {f"{package}.{name.replace('/', '.')}" for name in re.findall(r"^([\w/]+)\.py ", section, re.MULTILINE)}
    assert lines == {name for name, path in modules(package).items() if path.name != "__init__.py"}
    for path in FOLDERS[package].rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
