# Layers in Depth. `make lab` and `make test` set up a fresh machine by themselves; the second time takes seconds.
# PYTHON=/path/to/python builds .venv over that interpreter and keeps the torch it has (`make clean` to start anew).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help lab test edit batch train figures times test-floor clean
export JUPYTER_PREFER_ENV_PATH := 1

PYTHON ?=
BIN := .venv/bin/python
CALLER := $(if $(PWD),$(PWD),$(CURDIR))
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

help:
	@echo 'make lab          set up, open JupyterLab on lesson 00'
	@echo 'make test         set up, run all tests and every notebook (ARGS="-k name" for some; JOBS=4 processes, 2 if not said)'
	@echo 'make edit         IMAGE=photo.jpg AT=0.5 (or 2.4m) INSERT=cutout.png [DEPTH=depth.png OUTPUT=folder ...]'
	@echo 'make batch        INPUT=film.mp4 OUTPUT=folder [MODEL=sd15 AT=0.5 STEPS=9 MAX_SECONDS=40000 ...] (lesson 15)'
	@echo 'make train        train the mini models again (PART=vae for one of them)'
	@echo 'make figures      draw the pictures in figures/ again'
	@echo 'make times        run all lessons at full size, write data/times.json and the table'
	@echo 'make test-floor   the oldest supported packages, in .venv-floor'
	@echo 'make clean        remove the environments and build/'

# The first of these that runs and is recent enough: $(call a_python,candidates,upper limit)
a_python = $$(for p in $(1); do "$$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, $(2)))' \
	2>/dev/null && command -v "$$p" && break; done)
no_python = { echo "No Python 3.11 or newer was found. Install one, or name it: make $@ PYTHON=/path/to/python" >&2; exit 1; }

# A plain environment gets the exact versions of constraints.txt. Over an interpreter that has torch, its folders come
# after our own: torch, torchvision and numpy stay; the notebook server is installed anew, with its data files.
.venv/ready: pyproject.toml constraints.txt
	@python="$(call a_python,$(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11),15)"; \
	[ -n "$$python" ] || $(no_python); \
	echo "Setting up .venv with $$python; the first time fetches torch and takes some minutes."; \
	set -e; "$$python" -m venv .venv; mkdir -p build; cp constraints.txt build/constraints.txt; \
	if [ -n "$(PYTHON)" ] && "$$python" -c 'import torch, torchvision' 2>/dev/null; then \
		"$$python" -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' \
			> "$$($(BIN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/reused.pth"; \
		"$$python" -m lib.setup keep > build/keep.txt; \
		grep -vE '^(torch|torchvision|numpy)==' constraints.txt | cat - build/keep.txt > build/constraints.txt; \
		$(BIN) -m pip install -q --ignore-installed -c build/constraints.txt jupyterlab ipykernel ipywidgets anywidget \
			"setuptools>=77.0.3"; \
	fi; \
	$(BIN) -m pip install -q --disable-pip-version-check -c build/constraints.txt hatchling editables; \
	$(BIN) -m pip install -q --disable-pip-version-check -c build/constraints.txt --no-build-isolation -e ".[test]"; \
	$(BIN) -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1; \
	touch $@

lab: .venv/ready
	$(BIN) -m jupyterlab $(AS_ROOT) $(wildcard notebooks/00_*.ipynb)

# The notebooks, shortened by SMOKE and otherwise untouched, are tests like all others: one run, one summary. Two
# processes of one thread each, whole files each (a notebook's cells are one file); JOBS=0 runs all in this process.
JOBS ?= 2
test: .venv/ready
	@$(BIN) -m lib.setup prepare build/notebooks
	OMP_NUM_THREADS=1 $(BIN) -m pytest tests build/notebooks -n $(JOBS) --dist loadfile --nbval-lax --nbval-current-env \
		--nbval-cell-timeout=300 $(ARGS)

# Every variable given on the command line is a parameter of the notebook; an unknown one is an error there. Values go
# through the environment, so that spaces and quotes in them survive.
GIVEN = $(filter-out PYTHON,$(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name))))
edit: .venv/ready
	@$(if $(IMAGE),,echo 'error: which picture? make edit IMAGE=photo.jpg AT=0.5 INSERT=cutout.png' >&2; exit 1;) \
	$(BIN) -m lib.setup run notebooks/edit.ipynb build/edit.ipynb --env $(sort $(GIVEN)) \
		--paths IMAGE DEPTH INSERT OUTPUT --at "$(CALLER)" && \
	echo "pictures and report: $(if $(filter OUTPUT,$(GIVEN)),$$OUTPUT,runs/edit)/report.html"

# The job of lesson 15 alone; the same command continues it. A cell may take days.
batch: .venv/ready
	@$(if $(INPUT),,echo 'error: which pictures? make batch INPUT=film.mp4 OUTPUT=folder' >&2; exit 1;) \
	$(if $(OUTPUT),,echo 'error: where to? make batch INPUT=film.mp4 OUTPUT=folder' >&2; exit 1;) \
	printf 'follow it from another terminal: %s -m lib.batch status %q\n' $(BIN) "$$OUTPUT"; \
	$(BIN) -m lib.setup run notebooks/15_two_gpus_on_kaggle.ipynb build/batch.ipynb -p JOB_ONLY True --timeout 1000000 \
		--env $(sort $(GIVEN)) --paths INPUT OUTPUT DEPTH INSERT DONE_ROOT --at "$(CALLER)" && \
	{ cd "$(CALLER)"; "$(CURDIR)/$(BIN)" -m lib.batch status "$$OUTPUT"; echo "report: $$OUTPUT/report/report.html"; }

train: .venv/ready
	$(BIN) -m lib.train $(or $(PART),all)

figures: .venv/ready
	$(BIN) -m lib.show figures

times: .venv/ready
	$(BIN) -m lib.setup times

test-floor: .venv-floor/ready
	.venv-floor/bin/python -m lib.setup report
	.venv-floor/bin/python -c 'from lib import models; models.load("mini"); models.load("mini-inpaint")'
	.venv-floor/bin/python -m lib.setup run $(wildcard notebooks/00_*.ipynb) build/floor/00.ipynb

.venv-floor/ready: pyproject.toml
	@python="$(call a_python,$(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3),13)"; \
	[ -n "$$python" ] || $(no_python); \
	set -e; "$$python" -m venv .venv-floor; mkdir -p build; \
	.venv-floor/bin/python -m pip install -q --disable-pip-version-check packaging; \
	.venv-floor/bin/python -m lib.setup floors > build/floors.txt; \
	.venv-floor/bin/python -m pip install --disable-pip-version-check -q -c build/floors.txt -e .; \
	.venv-floor/bin/python -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1; \
	touch $@

clean:
	rm -rf .venv .venv-floor build
