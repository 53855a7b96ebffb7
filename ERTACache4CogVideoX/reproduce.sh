#!/bin/sh
# Reproduce the table: every rival on this model, into ./reproduced (results.json, table.md, report.html).
#   sh reproduce.sh --methods ertacache,paper,magcache --computed-steps 25,16 --seeds 0,1,2
# Prompts shared out over several GPUs, once the environment is there: the same flags after
#   ../.venv/bin/accelerate launch --num_processes 4 reproduce.py
here=$(cd "$(dirname "$0")" && pwd)
root="$here/.."
. "$root/setup.sh"
exec "$PYTHON" "$here/reproduce.py" "$@"
