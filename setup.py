"""Packaging. The four top-level folders are reached through links inside ``cpmpi`` (see docs/development.md)."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

VERSION = re.search(r'__version__ = "(.+)"', Path("cpmpi/version.py").read_text(encoding="utf-8"))[1]

setup(
    name="cpmpi",
    version=VERSION,
    description="Exact whole-document LLM prefill and scoring as MPI batch jobs",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["cpmpi", "cpmpi.*"]),
    package_data={"cpmpi": ["py.typed"], "cpmpi.report": ["page/*"]},
    install_requires=[
        "click>=8.1",
        "greenlet>=3.0",
        "h5py>=3.10",
        "mpi4py>=4.0",
        "numpy>=1.26",
        "safetensors>=0.4",
        "slurm-python-utils>=1.7",
        "torch>=2.8",
        "transformers>=5.17,<5.25",
        "xxhash>=3.4",
    ],
    extras_require={
        "data": ["pyarrow>=15", "zstandard>=0.22"],
        "eval": ["lm_eval>=0.4.11,<0.5", "tqdm>=4.60"],
        "plot": ["matplotlib>=3.8"],
        "nvidia": ["nvidia-ml-py>=12"],
        # Under pytest 9.2 pytest-xdist 3.8 no longer groups tests (pytest-xdist issue 1386).
        "test": ["hypothesis>=6.100", "mypy>=1.10", "pytest>=8,<9.2", "pytest-xdist>=3.6", "ruff>=0.6"],
    },
    entry_points={
        "console_scripts": ["cpmpi = cpmpi.jobs.cli:main"],
        "lm_eval.models": ["cpmpi = cpmpi.engine.harness:CpmpiLM"],
    },
)
