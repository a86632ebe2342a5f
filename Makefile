# What each target runs is also in the README, for those without make.

PYTHON ?= python3
VENV ?= .venv
# The torch to install where $(PYTHON) has none that is new enough. For another build, or another
# index: make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PROMPT ?= red octopus on a yellow background
OUT ?= out/picture.png

BIN := $(VENV)/bin

# Threads that wait by turning hold up each other where processors are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.demo
	mkdir -p $(dir $(OUT))
	$(BIN)/attnproc generate "$(PROMPT)" --maps --out $(OUT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) out

$(VENV)/.torch:
	if $(PYTHON) -c "import torch.version as v; assert tuple(map(int, v.__version__.split('.')[:2])) >= (2, 9)" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/pip install $(TORCH); fi
	touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install -e ".[diffusers,cli,viz]"
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.torch
	$(BIN)/pip install -e ".[dev]"
	touch $@
