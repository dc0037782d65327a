#!/bin/sh
# Prints what `pip install -r requirements.txt` takes in a fresh environment, and beside it the whole first demo, which
# installs more: from nothing to the end of the answer. Neither finds a cache. PYTHON=/path/to/python as in ../run.
set -eu

python=${PYTHON:-python3}
tests=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT HUP TERM
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 XDG_CACHE_HOME="$folder/cache"

seconds() {
    begin=$("$python" -c 'import time; print(time.time())')
    "$@" >"$folder/log" 2>&1 || { cat "$folder/log" >&2 && exit 1; }
    "$python" -c "import time; print(round(time.time() - $begin, 1))"
}

"$python" -m venv "$folder/pip"
by_pip=$(seconds "$folder/pip/bin/pip" install -r "$tests/../requirements.txt")
demo=$(seconds "$tests/run" demo --once)
echo "$("$python" -V), $("$folder/pip/bin/pip" list 2>/dev/null | awk '/^(hayhooks|haystack-ai|openai|pip) / { printf "%s%s %s", comma, $1, $2; comma = ", " }')"
echo "pip install -r requirements.txt: $by_pip s, $(du -sm "$folder/pip" | cut -f 1) MB"
echo "./tests/run demo --once: $demo s, $(du -sm "$folder/cache" | cut -f 1) MB"
