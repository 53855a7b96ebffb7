#!/bin/sh
# Trains the transformer of one embedded pipeline on a GPU for some minutes, from a file of latents, and resumes:
#   sh bench/train_gpu.sh NAME MINUTES FILE [WORK [flags of train_tiny.py]]
# NAME: flux, wan, cogvideox or opensora. FILE: what `train_tiny.py --pack FILE` wrote, at most 40 MiB. WORK
# (build/train/NAME) holds the checkpoints; WORK/small, at most 16 MiB, is what to bring home: put into WORK of another
# machine its files are gone on with, and `train_tiny.py --report` makes a pipeline of them.
root=$(cd "$(dirname "$0")/.." && pwd)
case "$1" in
    flux) folder=ERTACache4FLUX ;;
    wan) folder=ERTACache4Wan2.1 ;;
    cogvideox) folder=ERTACache4CogVideoX ;;
    opensora) folder=ERTACache4OpenSora1.2 ;;
esac
if [ -z "$folder" ] || [ -z "$2" ] || [ ! -f "$3" ]; then
    sed -n '2,6s/^# *//p' "$0" >&2
    exit 2
fi
name=$1 minutes=$2 file=$(cd "$(dirname "$3")" && pwd)/$(basename "$3") work=${4:-$root/build/train/$1}
mkdir -p "$work" && work=$(cd "$work" && pwd) || exit 1
shift "$(($# < 4 ? 3 : 4))"
[ -x "$root/.venv/bin/python" ] && found="$root/.venv/bin/python"
export PYTHONPATH="$root/common${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$root/$folder" || exit 1
# a second late at most where all is well; else told to write what there is, and two minutes later killed
exec timeout -k 120 "$(awk "BEGIN { print 60 * $minutes + 90 }")" "${PYTHON:-${found:-python3}}" train_tiny.py \
    --packed "$file" --minutes "$minutes" --work "$work" --batch-factor 16 "$@"
