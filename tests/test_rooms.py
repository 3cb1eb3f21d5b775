"""The rooms of the package and who may import whom."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A module may import its own room and rooms of earlier lines.
FLOORS = [
    {"errors", "text", "values"},
    {"files", "yaml_files"},
    {"storage", "memory", "downloads"},
    {"config", "pages", "tensorboard"},
    {"model", "loss", "data", "draw"},
    {"weights", "evaluate"},
    {"training"},
    {"predict", "search"},
    {"serving"},
    {"launch", "export", "report"},
    {"demo"},
    {"cli"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules():
    """Every module of the package by its dotted name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in (ROOT / "raydetr").rglob("*.py")
    }


def imported(path, known):
    """The modules of the package that a file imports, also inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in known and name != "raydetr"}


def room(module):
    return module.split(".")[1]


def test_every_module_has_a_room():
    assert {room(name) for name in modules() if name != "raydetr"} == set(FLOOR)


def test_imports_run_down_only():
    known = modules()
    upward = [
        f"{name} imports {target}"
        for name, path in known.items()
        for target in imported(path, known)
        if name != "raydetr" and room(name) != room(target) and FLOOR[room(target)] >= FLOOR[room(name)]
    ]
    assert not upward


def test_no_module_imports_itself_through_others():
    known = modules()
    TopologicalSorter({name: imported(path, known) - {name} for name, path in known.items()}).prepare()  # raises CycleError


def test_only_launch_imports_ray():
    for name, path in modules().items():
        words = {
            word.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            for word in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""])
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert "ray" not in words or room(name) == "launch", name


def test_every_room_says_what_lives_there():
    for path in (ROOT / "raydetr").rglob("__init__.py"):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert text.count(".") >= 2, f"{path}: two sentences say what lives there and who calls it"
