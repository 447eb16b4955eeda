.PHONY: bench
##@ Figures
bench: engine .venv/ready ## Measure the image beside the container of FastAPI's guide; FLAGS=--short only checks the goals
	@.venv/bin/python -m bench.run $(FLAGS)
