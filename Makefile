# Every target does its own set-up; needs git, CPython 3.11, gcc and make.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PROTOS := $(wildcard protos/searchfoundation/v1/*.proto)
# Test files run at a time. Half of their time is waiting for processes to start and stop, even on two cores.
JOBS   ?= 4
# Some two hundred processes are started by the tests: what they import is compiled once, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup servers clients run test test-weights soak lint protos docs bench clean

setup: $(VENV)/.stamp protos

$(VENV)/.stamp: pyproject.toml constraints.txt $(wildcard services/core/modeling/native/*.[ch])
	@PYTHON=$(PYTHON) scripts/install $(VENV)
	@touch $@

protos: $(VENV)/.protos

# google/api/*.proto come with googleapis-common-protos, google/protobuf/*.proto with grpcio-tools.
$(VENV)/.protos: $(VENV)/.stamp $(PROTOS)
	@echo "  code from protos/"
	@$(BIN)/python -m grpc_tools.protoc -I protos \
	  -I $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=protos --mypy_out=quiet:protos --grpc_python_out=protos --mypy_grpc_out=quiet:protos $(PROTOS)
	@touch $@

servers:
	scripts/install-servers

clients: setup
	scripts/install-clients make

run: setup
	@$(BIN)/search-foundation up

test: setup servers clients
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Published numbers, of the models whose weights are in SF_MODEL_DIR or the Hugging Face cache.
test-weights: setup
	$(BIN)/pytest -m weights --timeout 600

soak: setup
	scripts/install-servers soak
	scripts/install-clients soak
	$(BIN)/pytest -m soak --timeout 3600

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/settings-table --check

docs: setup
	$(BIN)/python scripts/settings-table
	$(BIN)/python deploy/helm/tools/chart_docs.py
	$(BIN)/python deploy/helm/tools/dashboards.py
	$(BIN)/python deploy/helm/tools/sizing.py

bench: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) .venv-clients build dist *.egg-info .pytest_cache .ruff_cache
	find . -name '*_pb2*' -not -path './$(VENV)/*' -delete
