# make demo    read the sample pages and show what was read
# make test    lint, types, layers, and the tests
# make lint    the same without the tests
# make bench   page preparation, scheduling, pages/s, and pages/s against transformers, on this machine
# make sanitize the thread pool under ThreadSanitizer, the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make kernels every kernel as a fraction of this machine's limit
# make bench-gpu on a GPU box: the kernels' tests and speed on the device, their machine code, pages/s of the 3B's shape, the aims: out/gpu.md
# make clean   remove everything that was built

PYTHON ?= python3
PY := .venv/bin/python
INSTALLED := build/.installed
SAMPLES := bench/pages/*.png bench/pages/*.pdf

.PHONY: demo test lint bench bench-gpu kernels sanitize clean FORCE

demo: $(INSTALLED)
	@mkdir -p out
	@echo "reading $(SAMPLES)"
	@.venv/bin/pagemill read $(SAMPLES) -o out/demo.jsonl --overwrite
	@$(PY) bench/show.py out/demo.jsonl

# The Triton kernels, compiled and in the interpreter: two processes, each with work for one core.
test: lint
	$(PY) -m pytest --ignore tests/emulator --ignore tests/compiled
	@TRITON_INTERPRET=1 $(PY) -m pytest tests/gpu > build/interpreter-tests.txt 2>&1 & interpreter=$$!; \
		$(PY) -m pytest tests/emulator tests/compiled; compiled=$$?; \
		wait $$interpreter; interpreted=$$?; cat build/interpreter-tests.txt; exit $$((compiled + interpreted))

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

bench-gpu: $(INSTALLED)
	$(PY) bench/gpu_report.py

# The checked module stands in build/sanitize/, beside links to the package, and is found there before the installed one.
# Of ThreadSanitizer's options, die_after_fork=0 lets a child have threads, which is what the test is about. Leaks are not
# looked for: the interpreter and torch leave memory to the end of the process. What a sanitizer says goes by pytest's capture.
SANITIZE := build/sanitize
CHECKED := $(SANITIZE)/pagemill/_native.so
CHECKED_FLAGS := -std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=off -fPIC -pthread -Wall -Wextra
PRELOAD := $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))

sanitize: $(SANITIZE)/threads $(CHECKED)
	TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 $(SANITIZE)/threads
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZE) \
		$(PY) -m pytest tests/kernels -p no:faulthandler --capture=sys

$(SANITIZE)/threads: tests/native/test_threads.cpp csrc/threads.cpp csrc/threads.h
	@mkdir -p $(@D)
	$(CXX) $(CHECKED_FLAGS) -fsanitize=thread -Icsrc -o $@ $(filter %.cpp,$^)

$(CHECKED): $(patsubst csrc/%.cpp,$(SANITIZE)/%.o,$(wildcard csrc/*.cpp)) build/.files
	@mkdir -p $(@D)
	@find $(@D) -type l -delete
	@ln -s $(filter-out %.so,$(abspath $(wildcard runtime/*))) $(abspath kernels) $(@D)
	$(CXX) -shared -pthread -fsanitize=address,undefined -o $@ $(filter %.o,$^)

$(SANITIZE)/%.o: csrc/%.cpp | $(INSTALLED)
	@mkdir -p $(@D)
	$(CXX) $(CHECKED_FLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all -fvisibility=hidden \
		$$($(PY) -m pybind11 --includes) -MMD -c -o $@ $<
-include $(wildcard $(SANITIZE)/*.d)

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
