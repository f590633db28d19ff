"""cpmpi: exact whole-document LLM prefill and scoring as MPI batch jobs."""

__version__ = "0.1.0"
