# Each target sets up what it needs: a virtual environment in .venv with the package (editable) and the test tools.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A file of tests stays with one worker, and the longest ones come first (tests/conftest.py).
WORKERS := --numprocesses 2 --dist loadfile --no-loadscope-reorder
# The demo's processes: one on a GPU; on a CPU two with a thread each, which wait for each other less than threads do.
PROCESSES := 'import os, torch; print(1 if torch.cuda.is_available() else min(2, len(os.sched_getaffinity(0))))'

# Of packages that are installed: Python compiles what it imports of that then.
HARDLY_USED := tests?|diffusers/pipelines|fontTools|networkx|narwhals|pygments/lexers
# A process that starts a hundred others should find what Python has compiled.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo fashion help test thorough test-gpu quick lint types quick-tests durations bench soak nodes equivalence rehearsal counts fuzz clean

demo: $(READY)  ## train a teacher on the digits, distil it to one step, print the table
	$(BIN)/deepspeed --num_accelerators $$($(BIN)/python -c $(PROCESSES)) recipes/digits_ipfm.py

fashion: $(READY)  ## the same on Fashion-MNIST, 28x28 (apt-get install dataset-fashion-mnist), in some two hours on two cores
	$(BIN)/deepspeed --num_accelerators $$($(BIN)/python -c $(PROCESSES)) recipes/fashion_ipfm.py

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r target text; do \
	  printf '%-18s %s\n' "$$target" "$$text"; done

test: $(READY)  ## the suite, on a CPU: a GPU is hidden from it, and tests that need one are skipped with a reason
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS)

test-gpu: $(READY)  ## the tests of the kernels, and all others that are marked gpu, on this machine's GPU
	$(BIN)/pytest -m gpu

quick: $(READY)  ## style, types and some fast tests of each room, within 90 seconds
	+$(MAKE) --no-print-directory --jobs 3 --output-sync=target lint types quick-tests

quick-tests: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m quick $$(grep -rl --include='test_*.py' '^@pytest.mark.quick' tests)

thorough: $(READY)  ## of long lists of cases what `make test` leaves out
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) -m thorough

durations: $(READY)  ## what `make test` runs, recording how long each file takes, by which `make test` deals them out
	OMP_NUM_THREADS=1 $(BIN)/pytest $(WORKERS) --record-durations

lint: $(READY)  ## style, and which room may know which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(READY)  ## static types; a folder of links shows mypy the import names
	rm -rf build/types && mkdir -p build/types/ipfm
	for folder in engine kernels models recipes; do ln -s ../../../$$folder build/types/ipfm/$$folder; done
	MYPYPATH=build/types $(BIN)/mypy --explicit-package-bases -p ipfm

bench: $(READY)  ## kernel microbenchmarks; the offline compile report and the instruction count of perturb
	$(BIN)/ipfm bench --out build/bench
	$(BIN)/ipfm bench --offline --out build/bench

soak: $(READY)  ## kill a distillation fifty times and compare its end with an undisturbed one
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/soak.py

nodes: $(READY)  ## two machines, as network namespaces (root): launchers, folders that are not shared, cables that are cut
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'nodes or not nodes' tests/engine/distributed/test_two_nodes.py

equivalence: $(READY)  ## the engine against a plain PyTorch loop, every ZeRO stage and setting: tables
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/equivalence.py

rehearsal: $(READY)  ## what every recipe launches on a GPU, compiled for seven kinds of GPUs, in an hour or so without one
	OMP_NUM_THREADS=1 $(BIN)/python tests/helpers/rehearsal.py --out build/rehearsal.json

counts: $(READY)  ## what a step costs that can be counted without a GPU: waits, operators, traffic, the host's time
	$(BIN)/python -m ipfm.engine.commands.bench.counts

fuzz: $(READY)  ## damage four checkpoints at every byte and every length, and read them
	$(BIN)/python tests/helpers/fuzz_checkpoints.py tests/fixtures/*.pkl

$(READY): setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "ipfm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." \
	       "Set PYTHON=/path/to/python3.11, or on Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian: apt-get install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	@# Its weights and code, for a test; not torchvision, which it asks for and which has to be of torch's own build.
	$(BIN)/python -m pip install --quiet --no-compile --no-deps lpips==0.1.4
	@# pip would do it with one process, and with all that is hardly used; a file that is no Python is nothing new.
	$(BIN)/python -m compileall -qq -j 2 -x '/($(HARDLY_USED))/' $(VENV)/lib || true
	@# DeepSpeed's scripts begin with the path of Python, which ends at its first space: find it as pip's own scripts do.
	sed -i "1s|^#!/.* .*|#!/bin/sh\n'''exec' \"\$$(dirname \"\$$0\")/python\" \"\$$0\" \"\$$@\"\n' '''|" $(BIN)/d*
	touch $(READY)

clean:  ## remove what the targets above made, but for runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
