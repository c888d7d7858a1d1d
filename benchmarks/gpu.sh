#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, then benchmarks/gpu.py.
# PYTHON is a python with torch for CUDA; nothing is downloaded: qatkit is installed without its dependencies.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c "import qatkit" 2>/dev/null || "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e .
"$PYTHON" -m pytest -m gpu tests
"$PYTHON" benchmarks/gpu.py
