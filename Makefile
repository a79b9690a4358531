# Every target sets up .venv by itself; after that nothing here needs a network. Pick the interpreter with `make PYTHON=python3.12 ...`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-done
OUT ?= runs/demo

.PHONY: setup demo bench test test-slow lint clean

setup: $(STAMP)

# cords 0.0.4 pins torchtext and an old PyYAML, which do not install beside mosaicml: it comes without its dependencies,
# and the [cords] extra brings the three that its selection strategies import.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else \
		"error: Python 3.10, 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; name another with make PYTHON=python3.11" % v)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { echo 'error: no virtual environment; on Debian or Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev,cords]'
	$(BIN)/pip install --quiet --no-deps cords==0.0.4
	@touch $@

demo: $(STAMP)
	$(BIN)/effalgos demo --out $(OUT)

bench: demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -m 'not slow'

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
