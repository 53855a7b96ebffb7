#!/bin/sh
# Passes the tests: lint, format, types, and the suite. Arguments go to pytest.
root=$(cd "$(dirname "$0")" && pwd)
extra=dev
. "$root/setup.sh"
cd "$root" || exit 1
"$PYTHON" -m ruff check . && "$PYTHON" -m ruff format --check . && "$PYTHON" -m mypy || exit 1
# two files at a time, a thread each: the models are too small for more threads to help
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile "$@"
