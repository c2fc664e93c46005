# Needs Python 3.11 or newer and nothing else; everything is installed into .venv.
PYTHON ?= python3
PIP = .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PIP_TL4 = .venv-tl4/bin/pip install --quiet --disable-pip-version-check --constraint constraints-tl4.txt

.PHONY: demo test test-tl4 lint notebooks docs bench bench-quick fuzz torture train clean

demo: .venv/demo
	.venv/bin/tn-lens run --model toy --questions toy --out runs/demo

test: .venv/test docs
	.venv/bin/pytest -n 2 --dist loadgroup

# What touches a model, again on TransformerLens 4, which has TransformerBridge alone; in an environment of its own.
test-tl4: .venv-tl4/test
	.venv-tl4/bin/pytest -n 2 --dist loadgroup

lint: .venv/test
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .
	.venv/bin/pyright

# Runs the notebooks and keeps what they show.
notebooks: .venv/test
	.venv/bin/python -W ignore notebooks/refresh.py

# The guides and the reference as a site, from the docstrings; a dead link stops it.
docs: .venv-docs/done
	.venv-docs/bin/python -m sphinx -q -W --keep-going -E -d .venv-docs/doctrees docs site

# More than 10,000 cases of questions, settings and run folders that nobody thought of; some minutes.
fuzz: .venv/test
	TN_LENS_FUZZ=1 .venv/bin/pytest -o addopts= tests/test_fuzz.py

# A run killed with SIGKILL at 50 random moments; some minutes.
torture: .venv/test
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.torture --kills 50

# What integrated gradients and evaluation cost beside captum and plain loops; TRUTHFULQA=path of TruthfulQA.csv if offline.
bench: .venv/bench
	.venv/bin/python -W ignore benchmarks/attribution.py
	.venv/bin/python -W ignore benchmarks/evaluation.py --order-averaged $(TRUTHFULQA)

bench-quick: .venv/test
	.venv/bin/python -W ignore benchmarks/attribution.py --quick

# Trains the embedded model again, all five seeds, and chooses as the model card says; half an hour on two cores.
train: .venv/demo
	.venv/bin/python -m tn_lens.toy.choose

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/pip pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/test: .venv/demo
	$(PIP) --editable '.[test,notebook]'
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
	rm -rf .venv .venv-tl4 .venv-docs runs dist build site docs/reference docs/project .pytest_cache .ruff_cache
