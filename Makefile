PYTHON ?= python3
BIN := .venv/bin
MARKS ?= not slow
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all test-matrix check clean

demo: .venv/.installed  ## the main job on the embedded model: pilot, ranks that move, uniform LoRA beside; a table and a report
	$(BIN)/hydra-vlm tune --out runs/demo

test: .venv/.installed  ## the tests, without the slow ones
	$(BIN)/pytest -m "$(MARKS)" -n 2 --dist loadfile

test-all: .venv/.installed  ## the tests, the slow ones too
	$(BIN)/pytest

test-matrix: .venv/.installed  ## the tests as on six machines: threads, processor, where weights lie
	tools/test_matrix.sh

check: .venv/.installed  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build runs .pytest_cache .ruff_cache .mypy_cache
