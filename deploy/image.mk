# What a release pushes, and the digests of its images, without those of what attests them, which holds the time.
PLATFORMS ?= linux/amd64,linux/arm64
ATTEST    ?= --provenance=mode=max --sbom=true
PUSH    = type=image,name=$(IMAGE),oci-mediatypes=true,rewrite-timestamp=true,push-by-digest=true,push=true
PUSHED  = $(IMAGE)@$$(sed -n 's/.*"containerimage.digest": "\(.*\)".*/\1/p' .venv/$$try.json)
IMAGES  = {{range .Manifest.Manifests}}{{if ne .Platform.OS "unknown"}}{{println .Platform.Architecture .Digest}}{{end}}{{end}}

.PHONY: shell size reproduce release
##@ The image
shell: engine ## Open a shell, which the image does not have, beside the same packages and main.py
	$(BUILD) --target shell --tag $(IMAGE)-shell .
	$(ENGINE) run --rm --interactive $(shell test -t 0 && echo --tty) $(IMAGE)-shell

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
	@cmp .venv/1.txt .venv/2.txt && try=1 && echo $(PUSHED)
