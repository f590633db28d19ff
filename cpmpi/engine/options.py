"""What a user asks of the main job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpmpi.cost.memory import RESIDENCES
from cpmpi.errors import UserError


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a user asks of the job.

    Raises:
        UserError: a number is out of range.
    """

    model: Path
    """Checkpoint folder."""
    inputs: tuple[str, ...]
    """Files, folders and globs."""
    output: Path
    """Run folder."""
    keep_kv: bool = True
    """Whether the KV cache is stored."""
    attention: str = "auto"
    """Schedule: auto, ring, tree or hybrid."""
    segments: int = 2
    """Segments that a document is cut into."""
    tp: int = 1
    """Ranks that share the weights."""
    dtype: str = "auto"
    """Type to compute in."""
    kv_dtype: str = "bfloat16"
    """Type to store keys and values in."""
    device: str = "auto"
    """auto, cpu or cuda."""
    weights: str = "auto"
    """resident: all weights stay in memory; stream: a layer at a time; auto: as memory allows."""
    memory_limit: int | None = None
    """Bytes that a rank may use; None: its share of the node's free memory."""
    check_finite: bool = False
    """Whether weights and layers are searched for NaN and infinities."""
    chunk_tokens: int = 1024
    """Tokens that go through the model at a time."""
    special_tokens: bool | None = None
    """Whether the tokenizer adds special tokens; None: as it does by itself."""
    allow_longer: bool = False
    """Whether documents may be longer than the checkpoint's positions."""
    overwrite: bool = False
    """Whether a run in the output folder is deleted first."""
    trace: Path | None = None
    """File for what every rank did when, in the Trace Event Format."""
    plot: Path | None = None
    """File for a picture of it."""
    quiet: bool = False
    """Whether progress is left out."""
    command: str = ""
    """The command line, for the record."""

    def __post_init__(self) -> None:
        if self.weights not in RESIDENCES:
            raise UserError(f"--weights {self.weights}: choose one of {', '.join(RESIDENCES)}")
        for name in ("segments", "chunk_tokens", "tp"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
