# Fresh machine, Python 3.11+ and git: `make demo` and `make test` install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE_STAMP := $(VENV)/.docs
WORKERS ?= 2

.PHONY: demo test slow coverage real lint format bench docs dist dist-check clean

$(STAMP): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)   ## the whole story on handwritten digits, no download
	$(BIN)/recoup demo

test: $(STAMP)   ## everything that needs no data outside the repository, in nine minutes on two cores; CI adds slow and real
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not real and not slow'

slow: $(STAMP)   ## GPU kernels interpreted and compiled, processes that are killed, other processors, whole units in gates
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not real and slow'

coverage: $(STAMP)  ## both with the lines that no test runs, which takes longer
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'not real' --cov --cov-report=term

real: $(STAMP)   ## the tests on real data and pretrained networks (RECOUP_DATA)
	$(BIN)/python -m pytest -m real

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## every benchmark; the figures go to benchmarks/results
	for script in benchmarks/*_speed.py; do GOMP_SPINCOUNT=10000 $(BIN)/python $$script || exit 1; done

$(SITE_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(SITE_STAMP)

docs: $(SITE_STAMP)   ## the site, strictly and for use without a network, in site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(STAMP)   ## the source archive, and the wheel made from it alone, in dist/
	rm -rf dist
	$(BIN)/hatchling build -t sdist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --no-index -w dist dist/*.tar.gz

dist-check: dist   ## both, each in an empty environment of every supported Python there is, with the demo; three minutes and more each
	$(BIN)/python scripts/dist_check.py

clean:
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache .hypothesis .numba_cache htmlcov .coverage*
