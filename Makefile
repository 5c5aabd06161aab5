# make setup       create .venv and install the pinned packages (once; about 5 GB of downloads)
# make quickstart  train a small CNN under four reducers with two workers; ends with a table and a picture
# make test        the test suite                 make check       test, lint, format and types
# make oldest      the test suite under the oldest torch that works, in .venv-oldest (about 5 GB, once)
# make cluster     the tests on a virtual SLURM cluster; needs root, slurm-wlm munge iproute2 openmpi-bin
# make docs        docs/settings.md, from the classes of the settings
# make gpu         what needs a GPU: its tests, figures of reducers and steps, whole runs; a page in runs/gpu
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Tests wait for processes and deadlines, so one more at once than there are cores; each takes 1 GB and more.
SIDE_BY_SIDE := -n $(shell expr $$(nproc) + 1) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
QUICKSTART := runs/quickstart/$(shell date +%Y%m%d-%H%M%S)

.PHONY: setup quickstart test oldest cluster check

setup: $(VENV)/.complete

# The mark is written last, so that an interrupted installation is taken up again.
$(VENV)/.complete: requirements.txt
$(VENV)-oldest/.complete: requirements-oldest.txt
$(VENV)/.complete $(VENV)-oldest/.complete:
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --requirement $<
	touch $@

quickstart: setup
	@for reducer in exact topk global_topk sage; do \
	  $(RUN) run.py configs/digits.yaml reducer.name=$$reducer --workers 2 --runs $(QUICKSTART) || exit $$?; \
	done
	@$(RUN) -m sage.report $(QUICKSTART)
	@echo "On one machine a compressor only adds work: there is no link to save. From which speed on one pays:"
	@echo "  $(RUN) -m sage.report $(QUICKSTART) --link 100mbit"

test: setup
	$(RUN) -m pytest $(SIDE_BY_SIDE) $(PYTEST)

oldest: $(VENV)-oldest/.complete
	SAGE_ENV=$(CURDIR)/$(VENV)-oldest $(VENV)-oldest/bin/python -m pytest $(SIDE_BY_SIDE) $(PYTEST)

cluster: setup
	$(RUN) -m pytest -m cluster tests/cluster $(PYTEST)

.PHONY: docs
docs: setup
	$(RUN) -m docs

.PHONY: gpu
gpu: setup
	$(RUN) -m benchmarks.gpu $(GPU)

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(MAKE) test
