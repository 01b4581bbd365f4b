# make demo: compile the bundled model for this machine and watch it answer. make test: everything that CI runs.
# make nightly: the long tests, their result written to tests/nightly.json.
# All make the environment in .venv first; it is made once and again when what it installs has changed.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS = dev$(if $(wildcard /dev/nvidia0),$(comma)cuda)
comma := ,
STAMP := .venv/.installed
PACKAGES := artifacts compiler models ops runtime serve  # mypy finds no editable install whose folders have other names

.PHONY: demo test nightly lint clean

demo: $(STAMP)
	.venv/bin/python -m ingot.serve.demo

test: $(STAMP)
	.venv/bin/python -m pytest -n 2 --dist worksteal  # neighbours stay on one worker, and so do the fixtures that they share

nightly: $(STAMP)
	.venv/bin/python -m pytest -n 2 -m "nightly and not gpu" --record

lint: $(STAMP)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy -p ingot
	.venv/bin/mypy benchmarks/*.py

clean:
	rm -rf .venv build dist *.egg-info

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Ingot needs Python 3.11 or newer on the path, or make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	mkdir -p .venv/typing/ingot && ln -sfn $(addprefix $(CURDIR)/,$(PACKAGES)) .venv/typing/ingot
	touch $@
