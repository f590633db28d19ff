"""What programs of this user keep between jobs and can do without: small JSON files in ``$XDG_CACHE_HOME/cpmpi``.

A cache that cannot be read or written is none: no job fails for want of it.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/cpmpi`` where that is a full path, as the XDG specification has it, else ``~/.cache/cpmpi``;
    None where there is no home."""
    try:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (given if given.is_absolute() else Path.home() / ".cache") / "cpmpi"
    except RuntimeError:
        return None


def kept(file: Path) -> Any:
    """What a file of the cache holds; None where it is not there or cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(file: Path, facts: Any) -> OSError | None:
    """Keep what is known, at once, so that programs that do so together do no harm; what went wrong, if it did."""
    partial = file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as problem:  # no room, no permission
        with suppress(OSError):
            partial.unlink()
        return problem
    return None
