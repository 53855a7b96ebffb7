#!/bin/sh
# Measures real-size models on a GPU in nine minutes; flags are those of gpu.py, and `--needs` prints what it needs.
# Runs under $PYTHON, the environment .venv, or python3, whichever is there first, and fetches nothing.
root=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] && found="$root/.venv/bin/python"
export PYTHONPATH="$root/common:$root/bench${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
exec "${PYTHON:-${found:-python3}}" "$root/bench/gpu.py" "$@"
