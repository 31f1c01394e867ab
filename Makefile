# make demo    read the sample pages and show what was read
# make test    lint, types, layers, and the tests
# make lint    the same without the tests
# make bench   page preparation, scheduling, pages/s, and pages/s against transformers, on this machine
# make kernels every kernel as a fraction of this machine's limit
# make clean   remove everything that was built

PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := build/.installed
SAMPLES := bench/pages/*.png bench/pages/*.pdf

.PHONY: demo test lint bench kernels clean FORCE

demo: $(INSTALLED)
	@mkdir -p out
	@echo "reading $(SAMPLES)"
	@.venv/bin/pagemill read $(SAMPLES) -o out/demo.jsonl --overwrite
	@$(PY) bench/show.py out/demo.jsonl

test: lint
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p pagemill
	.venv/bin/lint-imports

bench: $(INSTALLED)
	$(PY) bench/prepare.py
	$(PY) bench/scheduler.py
	.venv/bin/pagemill bench --sweep concurrency=1,4,16
	$(PY) bench/compare_hf.py

kernels: $(INSTALLED)
	@mkdir -p out
	$(PY) -m pytest bench/kernels --benchmark-json=out/kernels.json
	$(PY) bench/compare_kernels.py out/kernels.json

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# The strict editable install links every file of the package into build/, so a new or a removed file needs it
# again, and so does a change of the C++ sources; a change inside a Python file does not.
$(INSTALLED): .venv/.created build/.files pyproject.toml setup.py requirements-dev.txt $(wildcard csrc/*)
	@echo "installing pagemill and what it needs into .venv"
	@$(PY) -m pip install -q -c requirements-dev.txt 'setuptools>=77' 'pybind11>=2.13'
	@$(PY) -m pip install -q -c requirements-dev.txt --no-build-isolation \
		--config-settings editable_mode=strict -e ".[dev]"
	@touch $@

.venv/.created:
	@$(PYTHON) -m venv .venv
	@touch $@

build/.files: FORCE
	@mkdir -p build
	@find runtime kernels -type f -not -name '*.pyc' -not -name '*.so' | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi
