"""The plan of the house: what each room of cpmpi may import. No arrow runs up, and there is no circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# room -> the rooms that it may import; each stands above those in its row
MAY_IMPORT = {
    "kernels": "",
    "topology": "",
    "slurm": "",
    "words": "",  # errors.py, text.py, version.py, choices.py
    "timeline": "words topology",
    "comm": "words topology",
    "documents": "words",
    "attention": "words timeline comm kernels",
    "model": "words comm documents attention kernels",
    "run": "words timeline attention documents",
    "cost": "words timeline comm attention model run kernels topology",
    "report": "words timeline documents model run topology",
    "engine": "words timeline comm documents attention model run cost kernels topology slurm",
    "jobs": "words timeline comm documents attention model run cost report engine kernels topology slurm",
}
GROUND = ("kernels", "topology", "slurm")
LINKED = (*GROUND, "jobs")


def files_of(room: str) -> list[Path]:
    if room == "words":
        return [p for p in (ROOT / "cpmpi").glob("*.py") if not p.name.startswith("__")]
    return sorted((ROOT / room if room in LINKED else ROOT / "cpmpi" / room).rglob("*.py"))


def room_of(module: str) -> str | None:
    """The room of an imported module; None for other packages."""
    parts = module.split(".")
    if parts[0] != "cpmpi" or len(parts) == 1:
        return None
    return parts[1] if parts[1] in MAY_IMPORT else "words"


def imports(file: Path) -> list[str]:
    """The modules that a file imports anywhere in it, also for type checkers only."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{file}: a relative import that leaves the room"
            names = [f"cpmpi.{alias.name}" for alias in node.names]
            found += names if node.module == "cpmpi" else [node.module or ""] if not node.level else []
    return found


def test_rooms_import_what_they_may():
    up = []
    for room, allowed in MAY_IMPORT.items():
        for file in files_of(room):
            for module in imports(file):
                other = room_of(module)
                if other is not None and other != room and other not in allowed.split():
                    up.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not up, "\n".join(up)


def test_the_plan_has_no_circle():
    above: dict[str, int] = {}
    for room, allowed in MAY_IMPORT.items():  # rows are in order: each may only name rooms before it
        assert all(other in above for other in allowed.split()), room
        above[room] = len(above)


def test_every_file_is_in_a_room():
    rooms = {p.name for p in (ROOT / "cpmpi").iterdir() if (p.is_dir() or p.is_symlink()) and p.name != "__pycache__"}
    assert rooms == MAY_IMPORT.keys() - {"words"}


def test_every_room_says_what_it_is_for():
    for room in MAY_IMPORT.keys() - {"words", *LINKED}:
        opening = ast.parse((ROOT / "cpmpi" / room / "__init__.py").read_text())
        first, *rest = (ast.get_docstring(opening) or "").split("\n")
        assert first.endswith("."), room
        assert any(line.startswith("May import: ") for line in rest), room
