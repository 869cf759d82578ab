# make demo     sets up .venv with what generating needs, then writes with the shipped model
# make explain  makes a page that shows what the shipped model does with a text
# make test     sets up the rest, then runs every test
# make lint     checks the style
#
# Both set-ups are quick the second time, and done again when a requirements file changes.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
TORCH_CPU = https://download.pytorch.org/whl/cpu

.PHONY: demo explain test lint clean

demo: .venv/generate
	@.venv/bin/python gpt2.py "ROMEO:" --model_size shakespeare \
		--n_tokens_to_generate 200 --temperature 0.8 --seed 1

explain: .venv/generate
	@.venv/bin/python explain.py "ROMEO: But soft, what light through yonder window breaks?" \
		--model_size shakespeare --out explain.html

test: .venv/test
	.venv/bin/python -m pytest

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
	@$(PIP) -r requirements/generate.txt >&2
	@touch $@

# PyTorch without CUDA's gigabytes, where its own index can be reached; else whatever pip finds.
.venv/test: requirements.txt $(wildcard requirements/*.txt) | .venv/bin/python
	@echo "installing what the tests need: some minutes the first time ..." >&2
	@$(PIP) --no-deps --retries 0 --index-url $(TORCH_CPU) "$$(grep ^torch requirements/test.txt)" \
		>/dev/null 2>&1 || true
	@$(PIP) -r requirements/test.txt >&2
	@touch $@ .venv/generate
