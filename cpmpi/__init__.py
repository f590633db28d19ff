"""cpmpi: exact whole-document LLM prefill and scoring as MPI batch jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpmpi.run.reader import open_run

__version__ = "0.1.0"
__all__ = ["__version__", "open_run"]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: ``import cpmpi`` alone is cheap."""
    if name == "open_run":
        from cpmpi.run.reader import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
