#!/bin/sh
# Generate pictures with ERTACache into ./sample. Every constant of config.py is a flag:
#   sh run.sh --prompt "a penguin, on an orange background" --seed 7 --computed-steps 10
here=$(cd "$(dirname "$0")" && pwd)
root="$here/.."
. "$root/setup.sh"
exec "$PYTHON" "$here/generate.py" "$@"
