# make demo: install into .venv and train on the embedded data set.   make test: install and run the tests.
# make bench: what a step, the loader, an evaluation and a start cost here.   make bench-peer: step, samples, val.py and figures against the peers'.
# make soak: fifty runs are killed at random moments, and one of two ranks in twenty more; all must end as if nobody had
# touched them; ten minutes on two cores.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEER := .venv-peer

.PHONY: demo test install lint clean bench bench-peer soak

demo: $(VENV)/.installed
	$(BIN)/python train.py --name demo

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal  # more threads than cores wait for one another

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.bench

bench-peer: $(PEER)/.installed $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.peer
	$(BIN)/python -m benchmarks.coco_eval

soak: $(VENV)/.installed
	$(BIN)/python -m benchmarks.soak
	$(BIN)/python -m benchmarks.soak_ranks

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, this is " + sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	@echo "Installing requirements.txt into $(VENV): several GB with torch, some minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# torch without a local part such as +cpu, which PyPI has none of; an index of pip's settings that has them finds them anyway
$(PEER)/.installed: requirements-peer.txt $(VENV)/.installed
	@echo "Installing yolov5 7.0.14 into $(PEER), with the torch of $(VENV): several GB, some minutes"
	@$(BIN)/python -m venv --clear $(PEER)
	@$(BIN)/python -m pip list --format=freeze --disable-pip-version-check | sed -nE 's/^(torch(vision)?==[^+]+).*/\1/p' > $(PEER)/torch.txt
	@$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peer.txt -r $(PEER)/torch.txt
	@$(PEER)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps yolov5==7.0.14
	@touch $@

clean:
	rm -rf $(VENV) $(PEER) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
