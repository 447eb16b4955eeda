# For another platform than this machine's; and files that pip reads during the build and no layer holds:
# `make build NETRC=$HOME/.netrc PIP_CONF=pip.conf CA_CERT=ca.pem`.
PLATFORM    ?=
SECRETS      = $(foreach name,NETRC PIP_CONF CA_CERT,$(addprefix --secret src=,$(addsuffix $(COMMA)id=$(name),$($(name)))))
COMMA       := ,
override BUILD_FLAGS += $(addprefix --platform ,$(PLATFORM)) $(SECRETS)

# What a release pushes, and the digests of its images, without those of what attests them, which holds the time.
PLATFORMS ?= linux/amd64,linux/arm64
ATTEST    ?= --provenance=mode=max --sbom=true
PUSH    = type=image,name=$(IMAGE),oci-mediatypes=true,rewrite-timestamp=true,push-by-digest=true,push=true
PUSHED  = $(IMAGE)@$$(sed -n 's/.*"containerimage.digest": "\(.*\)".*/\1/p' .venv/$$try.json)
IMAGES  = {{range .Manifest.Manifests}}{{if ne .Platform.OS "unknown"}}{{println .Platform.Architecture .Digest}}{{end}}{{end}}

# Looking into the process of the service takes a second container of its image beside it, in its namespaces, with one
# capability; the service keeps its strict settings. The process is PID 1, or under an init its child; PROCESS= names
# another. The debugger talks to it over loopback, and through a file in the /tmp of the service.
SECONDS ?= 10
PROFILE ?= profile.html
PROCESS ?= $$($(ENGINE) exec $(NAME) python -ISc "print(1 if open('/proc/1/comm').read() == 'python\n' else \
           open('/proc/1/task/1/children').read().split()[0])")
BESIDE   = --pid container:$(NAME) --user 0 --cap-drop ALL --cap-add SYS_PTRACE --security-opt no-new-privileges \
           --entrypoint python
OWN      = $$($(ENGINE) inspect --format '{{.Config.Image}}' $(NAME))
SAMPLE   = $(OWN) -m profiling.sampling attach --all-threads --duration $(SECONDS)
FOUND    = $(RUNNING) || { echo "Nothing runs in $(ENGINE) as $(NAME): \`make run\` starts it."; exit 1; }

.PHONY: shell size reproduce release profile debug check-packages check-arm64 check-release
##@ The image
shell: engine ## Open a shell, which the image does not have, beside the same packages and main.py
	$(BUILD) --target shell --tag $(IMAGE)-shell .
	$(ENGINE) run --rm --interactive $(shell test -t 0 && echo --tty) $(IMAGE)-shell

profile: engine ## Sample the running service for SECONDS: its CPU time, as text; then a flame graph, waits included, in PROFILE
	@$(FOUND)
	@$(ENGINE) run --rm --network none $(BESIDE) $(SAMPLE) --mode cpu $(PROCESS)
	@$(ENGINE) rm --force $(NAME)-profile >/dev/null 2>&1; \
	$(ENGINE) run --name $(NAME)-profile --network none $(BESIDE) $(SAMPLE) --flamegraph --output /tmp/profile.html $(PROCESS) && \
	$(ENGINE) cp $(NAME)-profile:/tmp/profile.html $(PROFILE); status=$$?; $(ENGINE) rm $(NAME)-profile >/dev/null; exit $$status

debug: engine ## Attach Python's debugger to the running service, which stands still meanwhile; `q` lets it run on
	@$(FOUND)
	@process=$(PROCESS); $(ENGINE) run --rm --interactive $(shell test -t 0 && echo --tty) --network container:$(NAME) \
	    --env TMPDIR=/proc/$$process/root/tmp $(BESIDE) $(OWN) -m pdb -p $$process

size: .venv/ready ## Measure the image on each Python that it can be built from
	@$(PYTEST) --quiet --capture no -k small tests/test_image.py

reproduce: base .venv/ready ## Build the image twice from nothing and compare the two, bit by bit
	@for try in 1 2; do $(BUILD) --quiet --no-cache --provenance=false --output type=oci,dest=.venv/$$try.tar,rewrite-timestamp=true .; done
	@cmp .venv/1.tar .venv/2.tar && echo "The two builds are identical."; status=$$?; rm .venv/?.tar; exit $$status

release: base .venv/ready ## Build twice from nothing for PLATFORMS, compare, push to IMAGE without a tag, print the digest
	@test "$$TAG" = "v$(VERSION)" || { echo "TAG=$$TAG: the version in main.py is $(VERSION), so the tag must be v$(VERSION)."; exit 1; }
	@for try in 1 2; do \
	    $(BUILD) --no-cache --platform $(PLATFORMS) $(ATTEST) --metadata-file .venv/$$try.json --output $(PUSH) . && \
	    $(ENGINE) buildx imagetools inspect --format '$(IMAGES)' $(PUSHED) >.venv/$$try.txt || exit; done
	@test -s .venv/1.txt && cmp .venv/1.txt .venv/2.txt && try=1 && echo $(PUSHED)

check-packages: .venv/ready ## Build, import and use 57 packages in the image, and write docs/packages.md; takes minutes
	@$(PYTEST) tests/check_packages.py

check-arm64: .venv/ready ## Build the image for arm64 and test it there, by emulation where this machine is another
	@$(PYTEST) tests/test_arm64.py

check-release: .venv/ready ## Run `make release` whole against the registry at REGISTRY; takes minutes
	@$(PYTEST) tests/check_release.py
