# Chores; each runs commands that also work alone. `make` lists them. All but `test` need .venv: run `sh test.sh` once.

PYTHON = .venv/bin/python
# results of a comparison : the model folder whose page shows them
PAGES = flux_tiny:ERTACache4FLUX wan_tiny:ERTACache4Wan2.1 cogvideox_tiny:ERTACache4CogVideoX \
	opensora_tiny:ERTACache4OpenSora1.2

.PHONY: help lint types test bench figures

help:
	@echo "make lint      ruff: rules and format"
	@echo "make types     mypy on common/ertacache and common/compare"
	@echo "make test      lint, types and the suite (sh test.sh)"
	@echo "make bench     measure again what runs on a CPU, into bench/results: takes long"
	@echo "make figures   fill the generated tables and figures of all pages, from bench/results"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

test:
	sh test.sh

# Not the comparisons: run `sh reproduce.sh` in a model folder, and copy its results by hand (CONTRIBUTING.md).
bench:
	$(PYTHON) bench/latency.py --tiny --memory
	$(PYTHON) bench/latency.py
	$(PYTHON) bench/few_steps.py
	$(PYTHON) bench/prompts_needed.py
	$(PYTHON) bench/scaling.py
	$(PYTHON) bench/changed_weights.py
	$(PYTHON) bench/ablation.py
	$(PYTHON) bench/published_parts.py
	$(PYTHON) bench/carry_over.py
	$(PYTHON) bench/realism.py
	$(PYTHON) bench/fuzz_calibration.py
	$(PYTHON) bench/fuzz_kill.py
	$(PYTHON) bench/enable.py
	$(PYTHON) bench/fuzz_enable.py

figures:
	@for page in $(PAGES); do \
		results=bench/results/$${page%%:*}.json; folder=$${page#*:}; \
		[ -f "$$results" ] || continue; \
		$(PYTHON) -m compare.table "$$results" --into "$$folder/README.md" && \
		$(PYTHON) -m compare.plots "$$results" --out "$$folder/figures" || exit 1; \
	done
	$(PYTHON) bench/ablation.py --page
	$(PYTHON) -m compare.overview $(wildcard $(foreach page,$(PAGES),bench/results/$(firstword $(subst :, ,$(page))).json)) --into README.md
	$(PYTHON) bench/speed_page.py
	$(PYTHON) bench/changed_weights.py --page
	$(PYTHON) bench/enable.py --page
	$(PYTHON) bench/published_parts.py --page
	$(PYTHON) bench/carry_over.py --page
	$(PYTHON) bench/realism.py --page
