"""JSON with a checksum of its content, and of a text that belongs to it: ``schedule.json`` and ``topology.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from cpmpi.errors import UserError, one_line


def sealed_json(content: dict[str, Any], **texts: str) -> str:
    """An object as text, with the checksum of each text by its name, and of all the rest."""
    content = {**content, **{f"{name}_xxh3": xxhash.xxh3_64_hexdigest(text.encode()) for name, text in texts.items()}}
    return json.dumps({**content, "xxh3": _digest(content)}, indent=1) + "\n"


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a file; one that older versions wrote has no checksum.

    Raises:
        UserError: it is damaged, or there is none.
    """
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("xxh3", None)
    except (OSError, ValueError, AttributeError) as problem:
        raise UserError(f"{path}: cannot be read ({one_line(problem)})") from problem
    if digest not in (None, _digest(content)):
        raise UserError(f"{path}: damaged: it does not have its checksum")
    found: dict[str, Any] = content
    return found


def check_text(path: Path, digest: str | None) -> None:
    """Compare a text file with the checksum that belongs to it; None: there is none.

    Raises:
        UserError: it differs, or there is no such file.
    """
    try:
        found = xxhash.xxh3_64_hexdigest(path.read_bytes())
    except OSError as problem:
        raise UserError(f"{path}: cannot be read ({one_line(problem)})") from problem
    if digest not in (None, found):
        raise UserError(f"{path}: damaged: it does not have the checksum that was recorded")


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
