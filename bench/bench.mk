.PHONY: bench
##@ Figures
bench: engine .venv/ready ## Measure the image beside what one would pick instead, in 8 minutes; FLAGS=--short only checks the goals
	@.venv/bin/python -m bench.run $(FLAGS)
