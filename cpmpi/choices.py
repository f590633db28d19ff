"""What an option may be, each list stated once; names alone, so that a command line needs no library to show them."""

from __future__ import annotations

from collections.abc import Sequence

from cpmpi.errors import UserError
from cpmpi.text import shown

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
SPANS = ("lines", "sentences", "paragraphs")
PREFIX_TOKENS = ("bos", "none")
KEPT_SCORES = ("rank", "entropy", "greedy", "moments")
KEEP_CHOICES = f"{', '.join(KEPT_SCORES)}, topk=K and ids=FILE"


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


def split_keep(keep: Sequence[str]) -> dict[str, str]:
    """Each thing to keep with what follows its ``=``.

    Raises:
        UserError: there is no such thing, it is named twice, or it lacks or has a value.
    """
    found: dict[str, str] = {}
    for item in keep:
        name, given, value = item.partition("=")
        if name not in (*KEPT_SCORES, "topk", "ids"):
            raise UserError(f"--keep {shown(item)}: choose among {KEEP_CHOICES}")
        if (name in KEPT_SCORES) == bool(given) or (given and not value):
            fault = "takes no value" if name in KEPT_SCORES else f"needs a value; choose among {KEEP_CHOICES}"
            raise UserError(f"--keep {shown(item)}: {fault}")
        if name in found:
            raise UserError(f"--keep {shown(item)}: {name} is given twice")
        found[name] = value
    if "topk" in found and not (found["topk"].isdecimal() and int(found["topk"])):
        raise UserError(f"--keep topk={shown(found['topk'])}: must be a number of tokens from 1 on")
    return found


def check_prefix_token(value: str) -> None:
    """Refuse what is neither a choice nor a token id.

    Raises:
        UserError: it is neither.
    """
    if value not in PREFIX_TOKENS and not value.isdecimal():
        raise UserError(f"--prefix-token {shown(value)}: choose {', '.join(PREFIX_TOKENS)}, or a token id")
