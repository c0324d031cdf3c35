# make train   trains a small model on this machine, installing what it needs into .venv first
# make test    runs the tests, likewise
# make faults  every kind of fault under three layouts, and a long run without any: half an hour; writes docs/faults.md
# make fuzz    ten minutes of hostile input to all that reads files; what it finds is kept as a case for make test
# make lint    ruff and bandit
# make lock    requirements.lock anew, after a change of pyproject.toml or constraints.txt; wants uv
# make wheel   the last commit's wheel into dist/, the same bytes wherever it is built
#
# PYTHON=python3.12 chooses another interpreter; ARGS="train.steps=40" goes to the command.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# A process uses one core; several processes share the machine.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

installed := $(VENV)/.installed
torch := $(shell grep '^torch==' constraints.txt)
again := $(if $(wildcard $(VENV)/.installing),--ignore-installed)
pip := $(VENV)/bin/python -m pip install -qq --progress-bar off $(again)

# What requirements.lock lists is taken with the hash that it lists, or not at all, and nothing else is taken along. A wheel runs nothing when it
# is installed; these two exist as source only, and are built with what is there, since pip would fetch what builds them without a hash.
from_source := --only-binary :all: --no-binary deepspeed --no-binary antlr4-python3-runtime
locked := $(pip) --require-hashes --no-deps $(from_source) --use-pep517 --no-build-isolation

.PHONY: train test faults fuzz lint lock wheel install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -9

train: $(installed)
	@$(VENV)/bin/shoestring train experiment=tiny $(ARGS)

# A file's tests run in one worker, so that what they share is made once. (Not loadgroup: pytest-xdist 3.8 does nothing with pytest 9.2's ids.)
test: $(installed)
	@$(VENV)/bin/pytest -n 2 --dist loadfile $(ARGS)

faults: $(installed)
	@$(VENV)/bin/python -m shoestring.tests.faults.matrix --clean 2000 --output docs/faults.md $(ARGS)

fuzz: $(installed)
	@$(VENV)/bin/python -m shoestring.tests.fuzz --seconds 600 $(ARGS)

lint: $(installed)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/bandit -q -c pyproject.toml -r .

# Without torch, of which each index has builds of its own.
lock:
	@uv pip compile --quiet --upgrade --all-extras --constraint constraints.txt --universal --python-version 3.10 --generate-hashes \
	  $(from_source) --no-emit-package torch --no-annotate \
	  --custom-compile-command 'make lock' --output-file requirements.lock pyproject.toml

# A wheel keeps times and modes of files, which a checkout takes from the clock and the umask; and the name of the setuptools that built it.
wheel: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
wheel: $(installed)
	@tree=$$(mktemp -d) && trap 'rm -rf "$$tree"' EXIT && git archive HEAD | tar -x -C "$$tree" && chmod -R a+rX,go-w "$$tree" && umask 022 && \
	  $(VENV)/bin/python -m pip wheel -q --no-deps --no-build-isolation --no-index --wheel-dir dist "$$tree" && sha256sum dist/*.whl

install: $(installed)

# The stamp is written last. What an install that broke off was at counts as installed, and may lack files: the next make installs all again.
$(installed): pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: $(PYTHON) is not Python 3.10 to 3.13, which constraints.txt is made for; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(VENV)/bin/python || { echo "Creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); } || { \
	  echo "error: $(PYTHON) cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; exit 2; }
	@touch $(VENV)/.installing
	@echo "Installing Shoestring's dependencies into $(VENV): a minute or two ..."
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock | $(locked) --requirement /dev/stdin
	@$(locked) --requirement requirements.lock
	@echo "Installing $(torch): from one minute to ten, as the network allows ..."
	@$(pip) --constraint constraints.txt $(torch)
	@$(pip) --no-deps --no-build-isolation --editable .
	@mv $(VENV)/.installing $@
	@echo "Installed."

clean:
	rm -rf $(VENV) build dist *.egg-info
