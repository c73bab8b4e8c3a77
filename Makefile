# `make help` lists the targets. Everything runs inside .venv, which `make setup` builds from the exact pins in constraints.txt.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
STAMP := $(VENV)/.installed
# The interpreter that builds .venv: the one named by `make PYTHON=/path/to/python3.12 setup`, else the first that the pins resolve for.
# Never .venv's own, so it is looked up on the PATH without it.
HOST_PATH := $(subst $(CURDIR)/$(VENV)/bin:,,$(PATH))
BASE = $(shell export PATH='$(HOST_PATH)'; for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	"$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { command -v "$$p"; break; }; done)

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export NO_ALBUMENTATIONS_UPDATE := 1
# torch's threads wait without spinning: with a busy neighbour on the same cores a step took 40 times as long.
export OMP_WAIT_POLICY ?= PASSIVE
unexport PYTHONHOME
unexport PYTHONPATH

.PHONY: help setup data repro test test-all export docs pictures lab app bench clean distclean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## build .venv from the exact pins (nothing happens when it is up to date)

# The stamp is written last: an interrupted set-up is simply run again, and uv reuses what is there.
# A PYTHON named for it whose version .venv has not makes it anew.
ifneq ($(PYTHON),)
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell '$(BASE)' --version 2>/dev/null),$(shell $(VENV)/bin/python --version 2>/dev/null))
$(STAMP): another-version
endif
endif
endif
.PHONY: another-version
another-version:

$(STAMP): constraints.txt pyproject.toml setup.py settings.ini
	@[ -n "$(BASE)" ] || { echo "$(if $(PYTHON),PYTHON=$(PYTHON) is,The PATH holds) none of Python 3.11, 3.12 and 3.13. Remedy: install one (Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3 setup" >&2; exit 1; }
	@base="$(BASE)"; echo "setting up $(VENV) with $$("$$base" --version)"; \
	if "$$base" -c 'import ensurepip' 2>/dev/null; then \
		{ $(VENV)/bin/python -m pip --version >/dev/null 2>&1 && [ -z "$(PYTHON)" -o "$$($(VENV)/bin/python --version)" = "$$("$$base" --version)" ]; } || \
			"$$base" -m venv --clear $(VENV); \
		$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv; \
	elif "$$base" -m pip --version >/dev/null 2>&1; then \
		"$$base" -m venv --clear --without-pip $(VENV); \
		"$$base" -m pip --python $(VENV)/bin/python install --quiet --disable-pip-version-check --constraint constraints.txt uv; \
	else \
		echo "$$base can make no virtual environment: it has neither ensurepip nor pip. Remedy on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi
	@$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --compile-bytecode --requirement constraints.txt
	@$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

# After a failure: what this machine or tree lacks, if anything.
DOCTOR := { python -m skinlesion.pipeline.cli doctor --problems >&2; exit 1; }

# `data/` is fetched only where it is absent, into a scratch folder first: what stands at `data/` is whole, or the user's own.
data: $(STAMP) ## fetch the embedded dataset, unless data/ is there
	@if [ -e data ]; then echo "data/ is there: left as it is"; else \
		rm -rf .work/data; mkdir -p .work; { dvc fetch data.dvc >/dev/null && dvc get --quiet . data --out .work/data; } || $(DOCTOR); \
		[ -e data ] || mv .work/data data; fi

repro: data ## rebuild everything that is out of date, from data to reports
	@dvc repro || $(DOCTOR)
	@python -m skinlesion.pipeline.cli metrics
	@echo "reports: $(CURDIR)/reports/index.html"

# Two processes of one thread each: the small tensors of a test gain nothing from more. The order is that of
# tests/conftest.py, where the long files come first.
PARALLEL := --numprocesses 2 --dist loadgroup --no-loadscope-reorder --continue-on-collection-errors
test test-all: export OMP_NUM_THREADS := 1
# $(call TESTS,options of nbdev_test,options of pytest): all of both, then what is red.
define TESTS
	@mkdir -p .work; red=; \
	nbdev_test --n_workers 2 --path nbs $(1) 2>&1 | tee .work/notebooks.log || \
		red="notebooks $$(echo $$(awk '/^\t.*\.ipynb$$/ {print $$1}' .work/notebooks.log))"; \
	pytest $(PARALLEL) $(2) || red="$${red:+$$red; }tests (pytest names them above)"; \
	[ -z "$$red" ] || { echo "red: $$red" >&2; exit 1; }
endef

test: $(STAMP) ## every check: the notebooks, then tests/
	$(call TESTS,,-m "not slow")

test-all: $(STAMP) ## the same with the long series
	$(call TESTS,--flags slow,)

export: $(STAMP) ## after an edit in nbs/: library, clean notebooks, dvc.yaml's deps and README.md
	@nbdev_export && nbdev_clean
	@python -m skinlesion.pipeline.closure --write
	@python -c "from skinlesion.pipeline.readme import write_readme; write_readme()"

docs: $(STAMP) ## the documentation as a site in _docs/ that opens offline
	@python -m skinlesion.pipeline.docs

pictures: $(STAMP) ## after `make repro`: the two pictures of README, by a headless Chromium
	@python -m skinlesion.pipeline.pictures

lab: $(STAMP) ## JupyterLab on the notebooks (a picture of up to 50 MB can be uploaded, as in `make app`)
	@jupyter lab --notebook-dir=nbs --ServerApp.tornado_settings='{"websocket_max_message_size": 67108864}'

app: $(STAMP) ## the CAM explorer as a page (Voila)
	@voila nbs/apps/cam_explorer.ipynb

bench: $(STAMP) ## the benchmarks: ratios against named baselines
	@failed=; for b in benchmarks/*.py; do echo "== $$b"; python $$b || failed="$$failed $$b"; done; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

clean: ## remove what `make repro` and the tests make; data/, .venv and DVC's cache stay
	@rm -rf artifacts .work build .pytest_cache reports/index.html
	@[ ! -d reports ] || find reports -type f \( -name report.html -o -name executed.ipynb -o -name failed.ipynb -o -name run.json \) -delete
	@find nbs skinlesion tests benchmarks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	@rm -rf $(VENV) skinlesion.egg-info
