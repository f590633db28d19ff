"""What an option may be, each list stated once; names alone, so that a command line needs no library to show them."""

from __future__ import annotations

from collections.abc import Sequence

from cpmpi.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")
STORED_DTYPES = ("bfloat16", "float16", "float32")
SCHEDULES = ("ring", "tree", "hybrid")
DEVICES = ("cpu", "cuda")
TRANSPORTS = ("nccl", "gloo", "mpi")
RESIDENCES = ("resident", "stream")
KV_RESIDENCES = ("memory", "mapped")
EXPORTS = ("transformers", "safetensors", "parquet", "csv")
AUTO = "auto"
OFF = "off"
MOST_SEGMENTS = 1024


def check_segments(segments: int) -> None:
    """Refuse numbers of segments that nobody could wait for.

    Raises:
        UserError: there are too many, or none.
    """
    if not 1 <= segments <= MOST_SEGMENTS:
        raise UserError(
            f"--segments {segments}: must be between 1 and {MOST_SEGMENTS:,}; every piece of a rank attends to every "
            "piece of every other, so the kernel calls grow with the square of the segments"
        )


def one_of(name: str, value: str, choices: Sequence[str]) -> str:
    """The value, which must be one of the choices.

    Raises:
        UserError: it is not; they are listed.
    """
    if value not in choices:
        raise UserError(f"{name} {value}: choose one of {', '.join(choices)}")
    return value
