# The two commands of README.md. Plain pip lines that do the same are there too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types notebooks bench bench-gpu bench-gpu-step bench-gpu-fit clean

demo: $(STAMP)
	$(BIN)/lite-orpo train examples/demo.yaml

test: $(STAMP) lint types
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Executes the notebooks and keeps what they show.
notebooks: $(STAMP)
	$(BIN)/python examples/notebooks/execute.py

bench: $(STAMP)
	$(BIN)/python benchmarks/step_memory.py
	$(BIN)/python benchmarks/head_cpu.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/step_time.py

# On a machine with a GPU; torch, triton and pytest are enough (PYTHON=... to name the interpreter).
BENCH_GPU_JSON ?= head_gpu.json
bench-gpu:
	PYTHONPATH=kernels $(PYTHON) -m pytest -q -p no:cacheprovider $(addprefix tests/kernels/test_, \
		triton_logprobs.py triton_low_rank.py triton_orpo.py triton_filter.py on_gpu.py)
	PYTHONPATH=kernels $(PYTHON) benchmarks/head_gpu.py --minutes 5 --json $(BENCH_GPU_JSON)

# A whole step on packed rows; needs transformers, peft and accelerate beside torch and triton.
BENCH_GPU_STEP_JSON ?= step_gpu.json
bench-gpu-step:
	PYTHONPATH=.:kernels $(PYTHON) -m pytest -q -p no:cacheprovider tests/trainer/test_tree_on_gpu.py
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/step_time.py --device cuda --dtype bf16 \
		--json $(BENCH_GPU_STEP_JSON)

# QLoRA on Llamas of 1B, 3B and 8B; needs bitsandbytes too.
BENCH_GPU_FIT_JSON ?= fit_gpu.json
bench-gpu-fit:
	PYTHONPATH=.:kernels $(PYTHON) benchmarks/fit_gpu.py --json $(BENCH_GPU_FIT_JSON)

# Installed again when what is asked for has changed.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info runs
