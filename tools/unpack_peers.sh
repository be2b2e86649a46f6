#!/usr/bin/env bash
# Unpack what tools/pack_peers.sh packed, and print the environment in which Python finds it.
#
#   eval "$(tools/unpack_peers.sh [FOLDER [SITE]])"
#
# FOLDER is what was packed (default carry), SITE where it goes (default distmoe-peers among the
# temporary files; a second call unpacks nothing again). Needs Python 3.12 and no network.
set -euo pipefail

case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
    -*) echo "unknown option $1; see --help" >&2 && exit 2 ;;
esac
folder=${1:-carry}
site=${2:-${TMPDIR:-/tmp}/distmoe-peers}
PYTHON=${PYTHON:-python3}
large=$folder/cutlass_dsl_libs_base.tar.xz

[[ -f $large ]] || { echo "there is no $large; make it with tools/pack_peers.sh" >&2 && exit 2; }
if [[ ! -f $site/.unpacked ]]; then
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' ||
        echo "warning: the packages are for Python 3.12, this is $("$PYTHON" --version)" >&2
    mkdir -p "$site"
    # A wheel is an archive of what lies in site-packages; none of these has anything else.
    for wheel in "$folder"/*.whl; do
        "$PYTHON" -m zipfile -e "$wheel" "$site"
    done
    "$PYTHON" -m tarfile -e "$large" "$site"
    touch "$site/.unpacked"
fi
site=$(cd "$site" && pwd)

# .pth files are not read from PYTHONPATH, so the package's second folder is named as well.
cat <<END
export PYTHONPATH=$site:$site/nvidia_cutlass_dsl/python_packages\${PYTHONPATH:+:\$PYTHONPATH}
export CUTE_DSL_ARCH=sm_90a
export QUACK_COMPILE_WORKERS=\${QUACK_COMPILE_WORKERS:-$(nproc)}
export QUACK_CACHE_AUTOTUNING=1
END
