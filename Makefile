# make quickstart: train and evaluate an encoder on rendered scenes, in one process on all cores.
# make test: lint, types and the fast tests. make test-all: the slow ones too. make shapes: the fast tests of the library again,
# with every annotation and shape checked at each call. make docs: the site, into build/docs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SCENES := data/scenes
RUN := runs/quickstart

# Where Python is told to keep no bytecode, as many containers tell it, every start compiles torch, timm and the rest anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install quickstart test test-all shapes check docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[all,dev]'
	touch $@

quickstart: install
	$(BIN)/lejepa shards make synthetic --out $(SCENES)/train --count 8000 --size 48 --seed 0
	$(BIN)/lejepa shards make synthetic --out $(SCENES)/test --count 2000 --size 48 --seed 1
	$(BIN)/lejepa train --config quickstart engine.name=single run.dir=$(RUN)
	$(BIN)/lejepa convert $(RUN) $(RUN)/encoder --verify --overwrite
	$(BIN)/lejepa evaluate $(RUN) --train $(SCENES)/train --test $(SCENES)/test
	@echo "encoder: $(RUN)/encoder"
	$(BIN)/lejepa picture $(RUN) --shards $(SCENES)/test --out $(RUN)/picture.html

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow'

test-all: check
	$(BIN)/python -m pytest -n 2 --dist worksteal

shapes: install
	CHECK_SHAPES=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' --ignore tests/cli

docs: install
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "site: build/docs/index.html"

clean:
	rm -rf build *.egg-info $(RUN) $(SCENES)
