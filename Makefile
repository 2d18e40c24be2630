# make demo   the main job: a bundled teacher becomes a student and a diffusers pipeline in runs/mnist
# make report a comparison of bundled models, with few samples: runs/report/report.html
# make test   ruff and the whole test suite
# All first install the package and its tested dependencies into .venv. Without a GPU,
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu in the environment makes the download of PyTorch far smaller.
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
STAMP := $(VENV)/.installed
# accelerate gives each process one CPU thread unless told otherwise.
THREADS ?= $(shell nproc)

.PHONY: setup demo report test lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
		{ echo "error: Python 3.11 or newer with its venv module is needed, $(PYTHON) is not" \
		"(Debian: apt-get install python3 python3-venv; another one: make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: setup
	$(VENV)/bin/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(THREADS) distill/run.py recipes/mnist.yaml

report: setup
	$(VENV)/bin/distill compare recipes/compare/report.yaml

test: lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

lint: setup
	$(VENV)/bin/ruff check .

# Keeps runs/: trainings are not build products.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
