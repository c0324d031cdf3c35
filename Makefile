# make train   trains a small model on this machine, installing what it needs into .venv first
# make test    runs the tests, likewise
# make faults  every kind of fault under three layouts, and a long run without any: half an hour; writes docs/faults.md
# make lint    ruff
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
pip := $(VENV)/bin/python -m pip install -qq --progress-bar off --constraint constraints.txt

.PHONY: train test faults lint install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

train: $(installed)
	@$(VENV)/bin/shoestring train experiment=tiny $(ARGS)

# A file's tests run in one worker, so that what they share is made once. (Not loadgroup: pytest-xdist 3.8 does nothing with pytest 9.2's ids.)
test: $(installed)
	@$(VENV)/bin/pytest -n 2 --dist loadfile $(ARGS)

faults: $(installed)
	@$(VENV)/bin/python -m shoestring.tests.faults.matrix --clean 2000 --output docs/faults.md $(ARGS)

lint: $(installed)
	@$(VENV)/bin/ruff check .

install: $(installed)

# The stamp is written last: an install that broke off is taken up again by the next make.
$(installed): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: $(PYTHON) is not Python 3.10 to 3.13, which constraints.txt is made for; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(VENV)/bin/python || { echo "Creating $(VENV) ..."; $(PYTHON) -m venv $(VENV); } || { \
	  echo "error: $(PYTHON) cannot make a virtual environment (on Debian: apt-get install python3-venv)" >&2; exit 2; }
	@echo "Installing $(torch) into $(VENV): from one minute to ten, as the network allows ..."
	@$(pip) $(torch)
	@echo "Installing Shoestring and its other dependencies: a minute or two ..."
	@$(pip) --editable '.[test]'
	@touch $@
	@echo "Installed."

clean:
	rm -rf $(VENV) build dist *.egg-info
