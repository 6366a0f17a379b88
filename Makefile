# Two commands matter: `make reproduce` and `make test`. Both work on a bare machine with Python >= 3.11.
PYTHON ?= python3
PROFILE ?= embedded
SEEDS ?= 0
RUN_DIR ?=
BIN := .venv/bin
STAMP := .venv/.installed
# Threads that wait must not spin: with one competitor on two cores that costs half the speed or more.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.PHONY: reproduce test lint notebooks lab clean install
.DEFAULT_GOAL := reproduce

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; call: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(STAMP)

reproduce: $(STAMP)
	@$(BIN)/dcr model
	@TQDM_MININTERVAL=5 $(BIN)/dcr reproduce --profile $(PROFILE) --seeds "$(SEEDS)" --run-dir "$(RUN_DIR)"

# A process a core, a thread each; a file's tests stay together.
BESIDE := -n logical --maxprocesses 4 --dist loadfile
test: $(STAMP)
	@$(BIN)/dcr model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BESIDE)
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python -m pytest $(BESIDE) -p no:cacheprovider --nbval --nbval-sanitize-with tests/nbval.cfg --nbval-current-env --nbval-cell-timeout=600 --durations=5 notebooks

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Execute the committed notebooks again, in place, on the tables of figures/reference; keep outputs, drop machine traces.
notebooks: $(STAMP)
	cd notebooks && for n in 0*.ipynb; do \
	  TQDM_DISABLE=1 PYTHONWARNINGS=ignore ../$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace --ExecutePreprocessor.timeout=900 $$n || exit 1; done
	$(BIN)/nbstripout --keep-output --keep-count --keep-id --extra-keys "metadata.widgets metadata.papermill cell.metadata.papermill cell.metadata.execution" notebooks/0*.ipynb

lab: $(STAMP)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/index.ipynb notebooks

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -exec rm -rf {} +
