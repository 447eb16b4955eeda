# Knobs of Compose and Swarm, whose manifests have the defaults; deploy/.env keeps yours. PREFIX: `api`, `/api` and `/api/`
# are the same.
-include deploy/.env
override PREFIX := $(subst $() ,,$(addprefix /,$(subst /, ,$(PREFIX))))
export ACME_SERVER BASE_PYTHON EMAIL ENGINE HANG_SECONDS HOST HTTP_PORT HTTPS_PORT IMAGE MEMORY METRICS NAME NETWORK \
    PREFIX PROMETHEUS PROMETHEUS_PORT REPLICAS STOP_SECONDS TRAEFIK

COMPOSE    = $(ENGINE) compose --project-directory deploy
RUN_FLAGS += --env-file deploy/settings.env --volume "$(CURDIR)/deploy/secrets:/run/secrets:ro"

.PHONY: up update down stack watch lock-metrics
##@ Deployments
up: build ## Serve on this machine with HTTPS: replicas behind a proxy; what runs already is replaced as by `update`
	@deploy/up
	@echo "Service: https://$(or $(HOST),localhost):$(or $(HTTPS_PORT),443)$(PREFIX)/"

update: build ## Put new replicas in the place of those that `make up` started, without losing a request
	@test "$$($(COMPOSE) ps --quiet service)" || { echo "Nothing to update: \`make up\` starts it."; exit 1; }
	@deploy/up

down: engine ## Stop what `make up` started: the proxy, then the replicas after their drain
	@$(COMPOSE) --profile '*' down

stack: build ## Deploy to a Docker Swarm, or update it, once the steps before starting have succeeded
	@deploy/stack

watch: base ## Serve main.py in a container, anew after each change of it; a changed lock builds the image anew
	@$(ENGINE) compose --file deploy/watch.yaml up --build --watch

# The packages beside those of requirements.txt, whose versions stay.
lock-metrics: .venv/ready
	@$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	    --custom-compile-command "make lock-metrics" --constraint $(LOCK) \
	    $(shell sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' $(LOCK)) \
	    --output-file deploy/metrics/requirements.txt deploy/metrics/packages.in

# Knobs of `make deploy` and `make undeploy`: the cluster, as kubectl knows it; the namespace and IMAGE, unless they are as
# kustomization.yaml says.
CONTEXT   ?=
NAMESPACE ?=
ROLLOUT    = CONTEXT="$(CONTEXT)" NAMESPACE="$(NAMESPACE)" IMAGE="$(if $(filter file,$(origin IMAGE)),,$(IMAGE))" deploy/rollout

.PHONY: deploy undeploy
##@ Kubernetes
deploy: ## Deploy to the Kubernetes of CONTEXT: the steps before starting, then the replicas; goes back where these fail
	@$(ROLLOUT) deploy
undeploy: ## Remove from the Kubernetes of CONTEXT what `make deploy` has brought
	@$(ROLLOUT) undeploy
