#!/bin/sh
# Generate videos with ERTACache into ./sample. Every constant of config.py is a flag:
#   sh run.sh --prompt "a large striped red star moving right at the left" --seed 7 --computed-steps 12
here=$(cd "$(dirname "$0")" && pwd)
root="$here/.."
. "$root/setup.sh"
exec "$PYTHON" "$here/generate.py" "$@"
