# Makes or reuses the virtual environment .venv at the repository's root; sourced by the other scripts.
#   root=PATH_OF_REPOSITORY; [extra=dev;] . "$root/setup.sh"      sets $PYTHON
# A stamp holds the checksum of the lock file, so that a second call starts at once and a new lock installs.

root=$(cd "$root" && pwd)
lock="$root/requirements${extra:+-$extra}.lock"
stamp="$root/.venv/.installed${extra:+-$extra}"
wanted="$root $(cat "$root/requirements.lock" "$lock" "$root/pyproject.toml" | cksum)"
PYTHON="$root/.venv/bin/python"

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        found=""
        for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
            if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                found=$candidate
                break
            fi
        done
        if [ -z "$found" ]; then
            echo "error: Python 3.11 or newer is needed: install it and run this again" >&2
            exit 1
        fi
        echo "setup: making $root/.venv with $($found --version)" >&2
        "$found" -m venv --clear "$root/.venv" || exit 1
    fi
    echo "setup: installing the locked requirements (once; PyTorch is large)" >&2
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$lock" 2>"$root/.venv/pip.log" &&
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
            -e "$root" 2>>"$root/.venv/pip.log" || {
        tail -n 5 "$root/.venv/pip.log" >&2
        echo "error: installing the requirements failed; the whole log is in .venv/pip.log" >&2
        exit 1
    }
    echo "$wanted" >"$stamp"
fi
# transformers warns at import that torchvision is missing, which nothing here needs
export TRANSFORMERS_VERBOSITY="${TRANSFORMERS_VERBOSITY:-error}"
export PYTHON
