# Every target sets up .venv by itself; after that nothing here needs a network. Pick the interpreter with `make PYTHON=python3.12 ...`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-done
OUT ?= runs/demo
DATA ?= data
BENCH_OUT ?= runs/digits
OLDEST := 0.29.0

FFCV_PACKAGES := pkg-config libturbojpeg0-dev libopencv-dev

unexport PYTHONDONTWRITEBYTECODE  # else each of the many processes of the tests would compile this package

.PHONY: setup setup-ffcv ffcv-packages chromium demo bench gpu notebooks docs test test-all test-oldest lint clean

setup: $(STAMP)

# cords 0.0.4 pins torchtext and an old PyYAML, which do not install beside mosaicml: it comes without its dependencies,
# and the [cords] extra brings the three that its selection strategies import. mosaicml-streaming is installed in the same way.
# pip would compile the 20,000 modules one after the other.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else \
		"error: Python 3.10, 3.11 or 3.12 is needed, $(PYTHON) is %d.%d; name another with make PYTHON=python3.11" % v)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { echo 'error: no virtual environment; on Debian or Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile -e '.[recipes,search,cords,streaming,notebooks,docs,dev]'
	$(BIN)/pip install --quiet --no-compile --no-deps cords==0.0.4 mosaicml-streaming==0.13.0
	@$(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib || true  # some packages carry files that are no Python
	@touch $@

# ffcv is compiled here, against libraries that the system must have; with Debian's apt-get and as root they are installed.
setup-ffcv: $(STAMP) ffcv-packages
	@$(BIN)/python -c 'import ffcv' 2>/dev/null || \
		{ $(BIN)/pip install --quiet -e '.[ffcv]' && $(BIN)/pip install --quiet --no-deps ffcv==1.0.2; }

ffcv-packages:
	@$(BIN)/python -c 'import ffcv' 2>/dev/null || pkg-config --exists opencv4 libturbojpeg 2>/dev/null || { command -v apt-get >/dev/null && test "$$(id -u)" = 0 && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(FFCV_PACKAGES) >/dev/null; } || \
		{ echo 'error: ffcv needs OpenCV and TurboJPEG to build; as root: apt-get install $(FFCV_PACKAGES)' >&2; exit 1; }

demo: $(STAMP)
	$(BIN)/effalgos demo --out $(OUT)

bench: $(STAMP)
	$(BIN)/effalgos bench yamls/sweeps/digits.yaml --out $(BENCH_OUT)

# All that needs a GPU, in portions; again until it ends with status 0. DATA: the folder of CIFAR-10.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --data $(DATA) --minutes 9

# For the test of the report in a browser, on Debian and its like; without it that test is skipped.
chromium:
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium >/dev/null; }

# Runs the tutorials anew, each from a clean kernel, and stores their outputs.
notebooks: $(STAMP)
	$(BIN)/python notebooks/execute.py

# The pages are in build/site; a broken link or a docstring that cannot be read is an error.
docs: $(STAMP)
	$(BIN)/sphinx-build -q -W --keep-going -c docs . build/site

# Some minutes: shows that the installation works.
test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not long'

# Everything, as CI runs it: more cases, two ranks, kills and resumption, Composer's methods with every algorithm, the tutorials.
test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# The contract of the algorithms, on the oldest Composer that the package takes.
test-oldest: $(STAMP)
	@test -d build/oldest/composer || $(BIN)/pip install --quiet --no-deps --target build/oldest 'mosaicml==$(OLDEST)'
	PYTHONPATH=build/oldest $(BIN)/python -c 'import composer; assert composer.__version__ == "$(OLDEST)", composer.__version__'
	PYTHONPATH=build/oldest $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not long' tests/contract

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
