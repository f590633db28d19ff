"""A site's profile: the defaults of a batch request, in a TOML file that a person can read and change."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from cpmpi.slurm.request import BatchRequest

VARIABLE = "CPMPI_SLURM_PROFILE"
TYPES: dict[str, tuple[type, str]] = {
    "str": (str, 'a string such as "gpu"'),
    "int": (int, "a whole number"),
    "bool": (bool, "true or false"),
    "tuple": (list, 'a list of strings such as ["module load openmpi"]'),
}


def default_profile(environment: Mapping[str, str] | None = None) -> Path | None:
    """The profile that holds without ``--profile``: of ``$CPMPI_SLURM_PROFILE``, or in the user's configuration folder.

    Raises:
        ValueError: the variable names a file that is not there.
    """
    environment = os.environ if environment is None else environment
    if told := environment.get(VARIABLE):
        if not Path(told).is_file():
            raise ValueError(f"{VARIABLE}={told}: no such file")
        return Path(told)
    folder = environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME") or "/", ".config")
    path = Path(folder, "cpmpi", "slurm.toml")
    return path if path.is_file() else None


def read_profile(path: Path) -> dict[str, Any]:
    """What a profile says, by the names of the request's fields.

    Raises:
        ValueError: the file is not there or no TOML, or has an unknown key or a value of the wrong type; with its line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: cannot read this profile ({problem})") from None
    except tomllib.TOMLDecodeError as problem:
        raise ValueError(f"{path}: not TOML: {problem}") from None
    kinds = {field.name: re.split(r"\W", str(field.type))[0] for field in fields(BatchRequest)}
    values: dict[str, Any] = {}
    for key, value in found.items():
        where = f"{path}:{line_of(text, key)}"
        if key not in kinds:
            raise ValueError(f"{where}: unknown key {key!r}; the keys are {', '.join(kinds)}")
        kind, words = TYPES[kinds[key]]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (kind is list and not all(isinstance(item, str) for item in value)):
            raise ValueError(f"{where}: {key} must be {words}, not {value!r}")
        values[key] = tuple(value) if kind is list else value
        try:
            BatchRequest(**{key: values[key]})
        except ValueError as problem:
            raise ValueError(f"{where}: {problem}") from None
    return values


def line_of(text: str, key: str) -> int:
    """The line, counted from 1, in which a profile sets a key (or opens a table of its name)."""
    pattern = re.compile(rf"\s*(?:\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)
