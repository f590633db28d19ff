"""The demo's texts, which every machine with Python already has: the sources of its standard library.

Training reads all modules but the held-out ones. The demo's document is the beginning of one of those,
``_pydecimal.py`` (229 kB of arithmetic with its explanations and examples, part of every CPython since 3.5): as many
whole lines as fit in ``DOCUMENT_CHARACTERS``, so that it is about as long under every version of Python.
"""

from __future__ import annotations

import argparse
import sysconfig
from pathlib import Path

HELD_OUT = ("_pydecimal.py", "argparse.py", "heapq.py", "statistics.py", "tarfile.py")
DOCUMENT_MODULE = "_pydecimal.py"
DOCUMENT_CHARACTERS = 180_000

# Tests may not be installed, `encodings` and `pydoc_data` are generated tables, and site-packages are not Python's.
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


def standard_library() -> Path:
    """The folder of this Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def training_modules(library: Path) -> list[Path]:
    """Every module to train on, sorted by its path, whatever order the file system lists them in."""

    def wanted(module: Path) -> bool:
        parts = module.relative_to(library).parts
        generated = parts[0].startswith("config-") or module.name.startswith("_sysconfigdata")
        return not generated and not LEFT_OUT_FOLDERS.intersection(parts) and "/".join(parts) not in HELD_OUT

    return sorted((m for m in library.rglob("*.py") if wanted(m)), key=lambda m: m.relative_to(library).as_posix())


def document_text(characters: int = DOCUMENT_CHARACTERS) -> str:
    """The demo's document: the longest run of whole lines of ``_pydecimal.py``, from its start, within ``characters``.

    Raises ValueError where this Python's module is shorter than that.
    """
    module = standard_library() / DOCUMENT_MODULE
    text = module.read_text(encoding="utf-8")
    if len(text) < characters:
        raise ValueError(f"{module} has {len(text)} characters, the demo's document needs {characters}")
    return text[: text.rindex("\n", 0, characters) + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's document, about 68,000 tokens, to a text file.")
    parser.add_argument("output", type=Path, help="the text file to write")
    parser.add_argument("--characters", type=int, default=DOCUMENT_CHARACTERS, help="its length (default %(default)s)")
    arguments = parser.parse_args()
    arguments.output.write_text(document_text(arguments.characters), encoding="utf-8")


if __name__ == "__main__":
    main()
