"""The weight files of a checkpoint folder, and the tensors that their headers list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from cpmpi.errors import UserError, one_line


class Stored(NamedTuple):
    """A tensor of a file, by the file's header."""

    path: Path
    dtype: str
    shape: list[int]


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files that transformers loads from the folder, sorted by name.

    Raises:
        UserError: there are none, the index is broken, or a file that it names is missing.
    """
    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{checkpoint}: no weights there: neither {single.name} nor {index.name}")
    try:
        files = [checkpoint / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors files: no readable weight_map") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{checkpoint}: {len(missing)} of {len(files)} weight files are missing: {', '.join(missing)}")
    return files


def stored_tensors(checkpoint: Path) -> dict[str, Stored]:
    """The tensors of all weight files, by name; reads the headers alone.

    Raises:
        UserError: as for `weight_files`, or a file is damaged or cut short (named).
    """
    found: dict[str, Stored] = {}
    for path in weight_files(checkpoint):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118, it is no dict
                    tensor = file.get_slice(key)
                    found[key] = Stored(path, tensor.get_dtype(), tensor.get_shape())
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise UserError(f"{path}: damaged, or cut short to {size:,} bytes: {one_line(error)}") from error
    return found
