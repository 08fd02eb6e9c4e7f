# `make demo` and `make test` are all that a fresh checkout needs; both prepare .venv first.
SHELL = /bin/sh
BIN = .venv/bin
# The last: hundreds of processes are started, and none shall compile every module for itself.
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check bytecode demo-model deb test-rootfs test-js test-systemd test-churn test-memory bench clean

help:
	@echo 'make demo               two daemons that share the demo model, and a chat with them'
	@echo 'make demo PROMPT="..."  one answer on stdout'
	@echo 'make test               all checks and all tests'
	@echo 'make check              ruff, mypy and the import contracts alone'
	@echo 'make demo-model         train the demo model again'
	@echo 'make deb                dist/dgn_VERSION_ARCH.deb: the service, with ONNX Runtime and its libraries'
	@echo 'make test-rootfs        the demo in a minimal Debian root filesystem (root, mmdebstrap)'
	@echo 'make test-js            js-libp2p from npm asks a node (node, npm)'
	@echo 'make test-systemd       the .deb in Debian with a real systemd (root, systemd-nspawn, mmdebstrap)'
	@echo 'make test-churn         an hour of nodes that die, leave and join under load'
	@echo 'make test-memory        2.4 GB of weights in three nodes of 1.2 GiB, minutes of too many requests (root)'
	@echo 'make bench              figures of this machine'
	@echo 'make clean              removes .venv and caches'

# $(value): a dollar sign in a prompt is a dollar sign.
demo: export DGN_DEMO_PROMPT = $(value PROMPT)
demo:
	@scripts/bootstrap.sh demo
	@$(BIN)/python scripts/demo.py

check:
	@scripts/bootstrap.sh test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Made beside the checks, which take one core; else each of three processes of tests makes it for itself.
bytecode:
	@scripts/bootstrap.sh test
	@$(BIN)/python -m pytest -n 0 --collect-only -q >/dev/null 2>&1 &

test: bytecode check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -rs --durations 10

demo-model:
	@scripts/bootstrap.sh test
	$(BIN)/python scripts/demo_model/train.py

test-rootfs:
	@scripts/bootstrap.sh test
	DGN_TEST_ROOTFS=1 $(BIN)/python -m pytest -rs -s --timeout 3600 tests/test_infra_rootfs.py

test-js:
	@scripts/bootstrap.sh test
	DGN_TEST_JS=1 $(BIN)/python -m pytest -rs tests/test_p2p_js.py

deb:
	@scripts/bootstrap.sh demo
	$(BIN)/python packaging/deb/build.py

test-systemd:
	@scripts/bootstrap.sh test
	$(BIN)/python packaging/deb/build.py
	DGN_TEST_SYSTEMD=1 $(BIN)/python -m pytest -rs -s --timeout 1800 tests/test_deb.py tests/test_systemd.py tests/test_systemd_cluster.py

test-churn:
	@scripts/bootstrap.sh test
	$(BIN)/python benchmarks/churn.py --seconds 3600

test-memory:
	@scripts/bootstrap.sh test
	DGN_TEST_MEMORY=1 $(BIN)/python -m pytest -rs -s --timeout 1800 tests/test_memory_split.py tests/test_memory_overload.py

bench:
	@scripts/bootstrap.sh test
	@for name in startup line hop_cost quality; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
