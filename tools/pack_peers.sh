#!/usr/bin/env bash
# Download the packages that tools/bench_moe.py compares with, and those that training needs and a
# machine with torch may lack, for a GPU machine without a network.
#
#   tools/pack_peers.sh [--dry-run] [FOLDER]
#
# FOLDER (default carry, which git ignores) gets wheels for Python 3.12 on x86-64 Linux, and the
# largest one packed again by xz, so that all stay under 56 MiB, and under 64 MiB with the files of
# the repository; that takes several minutes and 2 GiB of memory.
# On the GPU machine: eval "$(tools/unpack_peers.sh)". --dry-run prints what would be done.
set -euo pipefail

PACKAGES=(
    liger-kernel==0.8.5
    # sonic-moe pins cutlass-dsl 4.4.2, which newer quack-kernels than 0.4 do not work with.
    sonic-moe==0.1.2.post1
    quack-kernels==0.3.11
    nvidia-cutlass-dsl==4.4.2
    apache-tvm-ffi==0.1.15.post2
    torch-c-dlpack-ext==0.1.5
    # distmoe reads its options by tyro, and writes a run's settings by tomli-w.
    tyro==1.0.17
    docstring-parser==0.18.0
    typeguard==4.6.1
    tomli-w==1.2.0
)
LARGE=nvidia-cutlass-dsl-libs-base==4.4.2
MOST_BYTES=$((56 << 20))
PYTHON=${PYTHON:-python3}

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0"
}

run() {
    if [[ -n $dry_run ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

dry_run=
folder=
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=yes ;;
        -h | --help) usage && exit 0 ;;
        -*) echo "unknown option $argument; see --help" >&2 && exit 2 ;;
        *) [[ -z $folder ]] || { echo "one folder only; see --help" >&2 && exit 2; }
           folder=$argument ;;
    esac
done
folder=${folder:-carry}

download() {
    local to=$1
    shift
    run "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps \
        --only-binary=:all: --python-version 3.12 --dest "$to" "$@"
}

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT

run mkdir -p "$folder"
download "$folder" "${PACKAGES[@]}"
download "$unpacked" "$LARGE"
if [[ -n $dry_run ]]; then
    echo "unpack the wheel of $LARGE and pack it as $folder/cutlass_dsl_libs_base.tar.xz"
    exit 0
fi
"$PYTHON" -m zipfile -e "$unpacked"/*.whl "$unpacked/site"
echo "packing $LARGE, which takes several minutes" >&2
# It is machine code, in libraries that are larger than the dictionary of xz's presets.
tar -C "$unpacked/site" -cf - . | xz --x86 --lzma2=preset=9,dict=192MiB \
    >"$folder/cutlass_dsl_libs_base.tar.xz"

total=$(cat "$folder"/*.whl "$folder"/*.tar.xz | wc -c)
echo "$folder: $total bytes, at most $MOST_BYTES" >&2
[[ $total -le $MOST_BYTES ]] || { echo "too large" >&2 && exit 1; }
