PYTHON ?= python3
BIN = .venv/bin
DEVICE ?= cuda
GPU_PYTHON ?= $(BIN)/python
KEPT = file://runs/benchmarks

.PHONY: demo test test-slow bench bench-compare gpu notebooks settings lint tensorboard clean

demo: .venv/installed
	$(BIN)/python cli.py fit --config configs/demo.yaml

test: .venv/installed           # two processes of one thread each: two threads on such small tensors mostly wait
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --cov=fl_lightning --cov=attack_modules --cov-report=term:skip-covered

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

bench: .venv/installed          # the images in FOLDER/<class>/*.jpg: CURIOUS_CLIENT_IMAGES=FOLDER make bench
	$(BIN)/python -m pytest tests/benchmarks/bench_attack.py -p no:warnings --benchmark-quiet -q \
		--benchmark-autosave --benchmark-storage=$(KEPT) $(BENCH)

bench-compare: .venv/installed  # two saved runs by their numbers: make bench-compare A=0001 B=0002
	PYTHONPATH=. $(BIN)/pytest-benchmark --storage $(KEPT) compare $(A) $(B) --columns=median,rounds --group-by=fullname --time-unit=s

# A table of what runs on a GPU, against the CPU's results. Where nothing can be installed: make gpu GPU_PYTHON=python3
gpu:
	PYTHONPATH=.:tests/benchmarks $(GPU_PYTHON) tests/benchmarks/gpu.py --device $(DEVICE) $(GPU_OPTIONS)

notebooks: .venv/installed      # executes them in place
	cd notebooks && OMP_NUM_THREADS=1 ../$(BIN)/jupyter nbconvert --to notebook --execute --inplace *.ipynb

settings: .venv/installed       # configs/README.md, from the command line's parser
	PYTHONPATH=. $(BIN)/python tests/settings_page.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tensorboard: .venv/installed
	$(BIN)/tensorboard --logdir runs

# Made anew only when the dependencies change.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
