# make demo      installs what generating needs in .venv, then generates with the shipped model
# make explain   writes a page that shows what the shipped model does with a text
# make serve     serves the shipped model at http://127.0.0.1:8000
# make test      installs the rest, then runs the quick tests, which takes minutes
# make test-slow runs the slow tests: repetitions, long runs, clusters
# make test-all  runs the quick tests and the slow ones
# make lint      checks the style
# make clean     deletes .venv
#
# Packages are installed once, and again when a requirements file changes. pip's output goes to
# .venv/pip.log. If pip fails, the end of the log is shown.

PYTHON ?= python3
TORCH_CPU = https://download.pytorch.org/whl/cpu

# Environments made by uv have no pip.
define pip
{ .venv/bin/python -m pip --version || .venv/bin/python -m ensurepip; } >/dev/null 2>&1; \
.venv/bin/python -m pip install --disable-pip-version-check $(1) >.venv/pip.log 2>&1 || \
	{ tail -n 20 .venv/pip.log >&2; exit 1; }
endef

.PHONY: demo explain serve test test-slow test-all lint clean
.NOTPARALLEL:

demo: .venv/generate
	@.venv/bin/python gpt2.py "ROMEO:" --model_size shakespeare \
		--n_tokens_to_generate 200 --temperature 0.8 --seed 1

explain: .venv/generate
	@.venv/bin/python explain.py "ROMEO: But soft, what light through yonder window breaks?" \
		--model_size shakespeare --out explain.html

serve: .venv/serve
	@.venv/bin/python serve.py --model_size shakespeare

# Two groups of tests run at the same time. The first needs JAX, or most of PyTorch, and is reported
# last. The second starts with the tests that need TensorFlow and a browser, in processes of their
# own, while the first still uses little memory. XLA's optimizations would take half of the time, so
# they are switched off here. The slow tests, and pytest called by itself, have them.
ON_JAX = recording estimate curves snapshots encoder evaluate kv_cache gpt2 progress examples gpu gpu_report \
	stress scoring kv_cache_jax devices docs backprop lora train
ON_OTHERS = tensorflow page explain learning serve utils backprop_run
tests = $(1:%=tests/test_%.py)
THE_REST = encoder.py evaluate.py corpus/examples.py generation model_files serving/guard.py \
	$(addprefix training/,curves.py estimate.py snapshots.py) \
	$(filter-out $(call tests,$(ON_JAX) $(ON_OTHERS)),$(wildcard tests/test_*.py))
QUICK = JAX_DISABLE_MOST_OPTIMIZATIONS=1 XLA_FLAGS="$$(cat .venv/xla_flags)" \
	MALLOC_TRIM_THRESHOLD_=131072 .venv/bin/python -m pytest -m "not slow"

test: .venv/xla_flags
	@$(QUICK) $(call tests,$(ON_JAX)) >.venv/jax.log 2>&1 & jax=$$!; failed=0; \
	trap "kill $$jax; exit 130" INT TERM; \
	$(QUICK) $(call tests,$(ON_OTHERS)) || failed=1; \
	$(QUICK) $(THE_REST) || failed=1; \
	wait $$jax || failed=1; cat .venv/jax.log; exit $$failed

test-slow: .venv/test
	.venv/bin/python -m pytest -m slow

test-all: test test-slow

lint: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

clean:
	rm -rf .venv

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed")'
	@echo "setting up .venv ..." >&2
	@$(PYTHON) -m venv .venv >&2 || { rm -rf .venv; exit 1; }

.venv/generate: requirements/generate.txt | .venv/bin/python
	@echo "installing the packages for generating (once, takes seconds) ..." >&2
	@$(call pip,-r requirements/generate.txt)
	@touch $@

.venv/serve: requirements/serve.txt | .venv/generate
	@echo "installing the packages for serving (once, takes seconds) ..." >&2
	@$(call pip,-r requirements/serve.txt)
	@touch $@

# PyTorch without CUDA's gigabytes if its own index can be reached, otherwise whatever pip finds.
.venv/test: requirements.txt $(wildcard requirements/*.txt) | .venv/bin/python
	@echo "installing the packages for the tests (once, takes minutes) ..." >&2
	@($(call pip,--no-deps --retries 0 --index-url $(TORCH_CPU) "$$(grep ^torch requirements/test.txt)")) \
		2>/dev/null || true
	@$(call pip,-r requirements/test.txt)
	@touch $@ .venv/generate .venv/serve

# XLA's older emitters compile in half the time. A later XLA may drop them, and XLA stops at an
# unknown flag, so the flag is tried first. With these emitters, code inside a loop can differ in the
# last bits from the same code outside it.
.venv/xla_flags: .venv/test
	@echo --xla_cpu_use_fusion_emitters=false >$@
	@XLA_FLAGS="$$(cat $@)" .venv/bin/python -c "import jax; jax.devices()" 2>/dev/null || : >$@
