# `make quickstart` and `make test` install what they need into .venv once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow test-all test-web lint docs install clean

quickstart: $(STAMP)
	$(BIN)/python -m kmax_d2.tools.quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow --durations 20

test-all: test test-slow

# The web page in a real browser.
test-web: $(STAMP)
	@$(PIP) install -e ".[web]" playwright
	@command -v chromium || command -v google-chrome || $(BIN)/playwright install --with-deps chromium
	$(BIN)/python -m pytest tests/web

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# A broken link, or anything public without a docstring, is an error.
docs: $(STAMP)
	@$(BIN)/python -c "import mkdocstrings, material" 2>/dev/null || $(PIP) install -e ".[docs]"
	$(BIN)/ruff check --select D100,D101,D102,D103 kmax_d2
	$(BIN)/mkdocs build --strict

install: $(STAMP)

# The stamp is written last, so that an interrupted install starts again. The tests compare with panopticapi, whose
# only form on PyPI asks for numpy<2 without needing it. CONSTRAINTS=constraints-oldest.txt installs the oldest versions.
CONSTRAINTS ?= constraints.txt
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) Makefile
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch and torchvision (a few minutes, once)"
	@$(PIP) install -c $(CONSTRAINTS) torch torchvision setuptools wheel
	@$(BIN)/python -c "import detectron2" 2>/dev/null || $(MAKE) --no-print-directory detectron2
	@echo "installing kmax_d2"
	@$(PIP) install -c $(CONSTRAINTS) -e '.[dev]'
	@$(PIP) install --no-deps panopticapi-lite
	@touch $@

# From its repository if that can be reached, or else the Python source of a build on PyPI. That wheel is tagged for
# CPython 3.10, but this project uses none of its compiled operators.
.PHONY: detectron2
detectron2:
	@echo "installing detectron2"
	@$(PIP) install -c $(CONSTRAINTS) fvcore iopath pycocotools matplotlib termcolor yacs tabulate cloudpickle tqdm \
	  tensorboard omegaconf hydra-core black packaging numpy opencv-python-headless
	@GIT_TERMINAL_PROMPT=0 $(PIP) install --no-build-isolation -c $(CONSTRAINTS) \
	  'git+https://github.com/facebookresearch/detectron2.git' >$(VENV)/detectron2.log 2>&1 \
	|| { echo "  no build from its repository (see $(VENV)/detectron2.log); taking the Python source from PyPI"; \
	  $(PIP) install --no-deps --only-binary=:all: --python-version 3.10 --implementation cp --upgrade \
	  --target "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')" sal-detectron2==0.7.2; }

clean:
	rm -rf $(VENV) output build *.egg-info
