#!/usr/bin/env bash
# Everything that needs a GPU, in one command: kernel and layer tests, then the bench with its peers,
# and a table of the best tile configurations, which a run takes as moe.kernel_tiles.
#
#   tools/check_gpu.sh [OUT]        OUT (default docs/benchmarks) gets JSON, pictures and the table
#
# PYTHON names the interpreter (default python3). Peers that are not installed are a line in the
# table; tools/unpack_peers.sh brings them. Ends with 1 if a test or a backend is wrong, after all
# of it ran.
set -uo pipefail
case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
    -*) echo "unknown option $1; see --help" >&2 && exit 2 ;;
esac
cd "$(dirname "$0")/.."
out=${1:-docs/benchmarks}
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "there is no GPU that torch can use" >&2 && exit 2; }
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
failed=0

"$python" -m pytest -m "gpu or not gpu" -k "not aot" --tb=short \
    tests/kernels tests/moe/test_no_host_sync.py tests/moe/test_layer.py \
    tests/planner/test_activation_memory.py || failed=1
bench() {
    local label=$1
    shift
    "$python" tools/bench_moe.py "$@" \
        --json "$out/$name-$label.json" --picture "$out/$name-$label.png" || failed=1
}
bench 7B --shapes 7B-256
bench rounding --shapes TR --rounding none,balance --backends triton,grouped_mm,bound
bench all --shapes 1.4B,7B,30B,README,Qwen3-30B-A3B,OLMoE-1B-7B --rounds 10
"$python" tools/bench_moe.py --shapes 7B-256,README --config configs/eight_gpu.toml \
    --backends triton --tune --write-tiles "$out/$name-tiles.toml" \
    --json "$out/$name-tiles.json" || failed=1
"$python" tools/measure_memory.py --json "$out/$name-memory.json" || failed=1
exit $failed
