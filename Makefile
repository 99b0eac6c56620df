# make train   set up, then train and score the default model on the default data
# make test    set up, then run the tests           make test-slow   the long ones as well
# make faults  break runs in every way, print a table
# make kills   a thousand times SIGKILL and a new start, about twenty minutes; ARGS=--help for what it takes
# make kill-sweeps   the same for a sweep of 2 rates x 3 seeds; ARGS=--help for what it takes
# make seeds   five seeds of the run of make train, with their mean; ARGS takes flags of train.py
# make bench   this project and its peers side by side, about half an hour; ARGS=--help for what it takes
# make start   seconds to the first step with 1,000 and 1,000,000 rows, about ten minutes
# make gpu-check  is it right on a GPU, and how fast: ten minutes on one; ARGS=--tiny for a trial without
# make lint    ruff and mypy                        make clean       remove the environment

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test test-slow lint format faults kills kill-sweeps seeds start bench gpu-check clean

# All of the launcher's values are named: it warns of those it has to choose. train.py --mixed_precision chooses bf16 itself.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

train: $(READY)
	$(LAUNCH) train.py --config recipes/movie_reviews.yaml $(ARGS)

# By name, not by number of tests: the files with few and long ones would come last, each on one core.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow" --timeout 1800 $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

faults: $(READY)
	$(BIN)/python -m tests.faults $(ARGS)

kills: $(READY)
	$(BIN)/python -m tests.kills $(ARGS)

kill-sweeps: $(READY)
	$(BIN)/python -m tests.kill_sweeps $(ARGS)

seeds: $(READY)
	$(BIN)/python sweep.py --seeds 5 -- --config recipes/movie_reviews.yaml $(ARGS)

start: $(READY)
	$(BIN)/python benchmarks/start.py $(ARGS)

bench: $(READY)
	$(BIN)/python benchmarks/bench.py $(ARGS)

gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

# Installs once; again when the requirements change.
$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[offline,tensorboard,trackio,onnx,peft,quantization,cleanlab,dev]"
	@touch $(READY)

clean:
	rm -rf .venv build *.egg-info
