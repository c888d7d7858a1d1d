#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, then benchmarks/gpu.py, which runs whatever the tests say.
# PYTHON is a python with torch for CUDA; nothing is downloaded: qatkit is installed without its dependencies.
# Exits with 1 if either failed.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WORKERS=${WORKERS:-4}
export PYTHONUNBUFFERED=1
"$PYTHON" -c "import qatkit.recipes" 2>/dev/null || "$PYTHON" -m pip install -q --no-deps --no-build-isolation -e . || exit 1
# only the files that hold such tests: others import what the machine may lack
marked=$(grep -rl --include='*.py' 'pytest.mark.gpu' tests)
"$PYTHON" -m pytest -m gpu -n "$WORKERS" --tb=short --show-capture=no --disable-warnings --durations=15 --junitxml=build/gpu.xml $marked
tests=$?
"$PYTHON" benchmarks/gpu.py
measured=$?
echo "tests that need a GPU: exit $tests; benchmarks/gpu.py: exit $measured"
[ "$tests" -eq 0 ] && [ "$measured" -eq 0 ]
