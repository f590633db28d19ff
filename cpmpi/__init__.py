"""cpmpi: exact whole-document LLM prefill and scoring as MPI batch jobs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cpmpi.errors import UserError
from cpmpi.version import __version__

if TYPE_CHECKING:
    from cpmpi.engine.api import extend, generate, import_kv, prefill, score
    from cpmpi.jobs.submit import submit
    from cpmpi.report.report import write_report
    from cpmpi.run.comparison import compare
    from cpmpi.run.reader import open_run

__all__ = [
    "UserError", "__version__", "compare", "extend", "generate", "import_kv", "open_run", "prefill", "score", "submit",
    "write_report",
]  # fmt: skip

# public name -> where it is; imported when it is first used, so that ``import cpmpi`` alone is cheap
PUBLIC = {
    "open_run": "cpmpi.run.reader",
    "compare": "cpmpi.run.comparison",
    "extend": "cpmpi.engine.api",
    "generate": "cpmpi.engine.api",
    "import_kv": "cpmpi.engine.api",
    "prefill": "cpmpi.engine.api",
    "score": "cpmpi.engine.api",
    "submit": "cpmpi.jobs.submit",
    "write_report": "cpmpi.report.report",
}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
