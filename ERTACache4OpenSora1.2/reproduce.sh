#!/bin/sh
# Reproduce the table: every rival on this model, into ./reproduced (results.json, table.md, report.html).
#   sh reproduce.sh --methods ertacache,paper,magcache --computed-steps 15,10 --seeds 0,1,2
here=$(cd "$(dirname "$0")" && pwd)
root="$here/.."
. "$root/setup.sh"
exec "$PYTHON" "$here/reproduce.py" "$@"
