#!/usr/bin/env bash
# The core tests, and whether upstream's code is what was read of it, against the newest patch of each diffusers minor
# from pyproject.toml's lower bound to the one before the pinned version, which passes the whole suite. Each wheel
# alone, without its dependencies, is put ahead of what the environment has. Arguments are the versions to try in place
# of those.
set -euo pipefail
cd "$(dirname "$0")/.."

versions=("$@")
((${#versions[@]})) || versions=(0.36 0.37 0.38 0.39 0.40 0.41)
python=${PYTHON:-python}
# Blocked, restored and equal afterwards: one pipeline of each kind of model, unless KINDS says otherwise.
kinds=${KINDS:-"text-to-image or ControlNet] or AnimateDiff or PixArt or Flux"}
tests=(tests/test_{attention,flux,padding,patching,pipelines,upstream,weights}.py)

# What 0.36 imports and newer versions of its companions no longer bring.
companions=$(mktemp -d)
trap 'rm -rf "$companions"' EXIT
"$python" -c "import httpx" 2> /dev/null ||
    "$python" -m pip install -q --target "$companions" -c tests/constraints.txt httpx

failed=()
for version in "${versions[@]}"; do
    folder=$(mktemp -d)
    "$python" -m pip install -q --no-deps --target "$folder" "diffusers==$version.*"
    found=$(PYTHONPATH=$folder:$companions "$python" -W ignore -c "import diffusers; print(diffusers.__version__)")
    echo "diffusers $found"
    # Their own deprecations are no failure of ours: warnings are not errors here.
    PYTHONPATH=$folder:$companions:${PYTHONPATH:-} "$python" -m pytest -q -W ignore \
        -k "test_patching or test_upstream or ahead_on_a_stream or padding or processor or (blocked_and_restored and ($kinds))" \
        "${tests[@]}" || failed+=("$found")
    rm -rf "$folder"
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
