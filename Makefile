# make quickstart  trains, grows and compares a small TokenFormer on the Python standard library (about 10 minutes)
# make test        runs the tests, and lists the systems that take longer than their budget of 20 s
# make slow        runs the rest: the learning experiments, and what needs PyTorch, transformers and PEFT
# Each makes its own environment in .venv first. Another Python: make PYTHON=python3.12 ...
VENV := .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: quickstart test slow lint bench clean

quickstart: $(VENV)/installed
	$(VENV)/bin/jaxtok study quickstart

test: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --budget 20 $(PYTEST)

slow: $(VENV)/installed-slow
	$(VENV)/bin/python -m pytest --slow -m "slow or torch" $(PYTEST)

bench: $(VENV)/installed
	$(VENV)/bin/jaxtok bench

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "jaxtok needs Python 3.11 or newer; say where it is: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --upgrade pip

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install -q -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install -q -e '.[test]'
	@touch $@

$(VENV)/installed-slow: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/python -m pip install -q -e '.[test,transformers]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
