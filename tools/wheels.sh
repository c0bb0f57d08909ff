#!/usr/bin/env bash
# Builds wheels for this machine's and for other systems with zig, which brings their C libraries, and looks into them:
# `tools/wheels.sh [DIRECTORY]`, after `pip install -e ".[wheels]"`; PYTHON is the interpreter that has it.  Nothing is run.
# Released wheels are made by cibuildwheel on the systems themselves (.github/workflows/wheels.yml).
set -euo pipefail
PYTHON=$(realpath -s "$(command -v "${PYTHON:-python3}")")
OUT=$(realpath -m "${1:-dist}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

wheel() { # the platform that the wheel names, zig's name of it, and how a library is linked there
    echo "== $1"
    mkdir "$work/$1"
    tar -xzf "$work"/fastrms-*.tar.gz -C "$work/$1" --strip-components=1
    CC="$PYTHON -m ziglang cc -target $2" LDSHARED="$PYTHON -m ziglang cc -target $2 $3" \
        "$PYTHON" -m build --wheel --no-isolation --outdir "$OUT" "--config-setting=--build-option=--plat-name=$1" "$work/$1" \
        > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
}

"$PYTHON" -m build --sdist --no-isolation --outdir "$work" . > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
for machine in x86_64 aarch64; do
    wheel "manylinux2014_$machine" "$machine-linux-gnu.2.17" "-shared -Wl,-s"
    wheel "musllinux_1_2_$machine" "$machine-linux-musl" "-shared -Wl,-s"
done
wheel macosx_11_0_arm64 aarch64-macos.11.0 "-shared -undefined dynamic_lookup"
wheel macosx_11_0_x86_64 x86_64-macos.11.0 "-shared -undefined dynamic_lookup"
for built in "$OUT"/*manylinux*.whl; do "$PYTHON" -m auditwheel show "$built"; done
"$PYTHON" -m abi3audit --strict --verbose "$OUT"/*abi3*.whl
