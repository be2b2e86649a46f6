#!/usr/bin/env bash
# Everything that needs a GPU, in parts: tests, the bench with its peers, a small training run.
#
#   tools/check_gpu.sh [--only PART,PART...] [--minutes N] [OUT]
#
# OUT (default docs/benchmarks) gets JSON, pictures and logs/PART.log. A part that fails or reaches
# its limit stops no other part; what it has by then is kept: benches write after every shape, runs
# after every step, and tests that failed are told. Parts, in this order, and their limits:
#
#   doctor     3 min   the machine, and NCCL with this process alone
#   tests      8 min   kernels, layer, attention; compiles several hundred small kernels
#   compile    5 min   kernels of the bench's shapes, as many at a time as there are cores
#   quick      4 min   bench of 7B-256: our kernels, grouped_mm and the bound
#   train      6 min   300 steps of configs/check_gpu.toml: rounded, top-k, FSDP-2, compiled
#   settings   5 min   60 steps each with what those leave out: Muon over FSDP-2, latent attention,
#                      attention inside of documents, rows of fp8, and run.deterministic, whose
#                      losses must be equal to those of a run that was resumed half way
#   ranks      9 min   where there are several GPUs: the transports over NCCL, the links, and a run
#                      over all GPUs with and without overlap and by point-to-point, whose losses
#                      must agree, with saves under way and a profile; and a run whose ranks
#                      share sequences, with rows of fp8
#   rounding   4 min   bench of TR, rounded and not
#   bench      9 min   bench of all shapes, without peers
#   tune       9 min   every tile configuration for 7B-256, README and configs/eight_gpu.toml,
#                      and the table of the best, which a run takes as moe.kernel_tiles
#   memory     3 min   bytes that a layer keeps, formula and measurement
#   peers      9 min   bench of 7B-256 with SonicMoE and Liger, which tune themselves
#   gluon      9 min   tests and bench of the warp-specialised kernels. Last, as a wrong barrier
#                      would let them wait for ever
#
# --only names the parts to run. --minutes ends everything after N minutes: the part that runs then
# is stopped, and those after it are left out.
# PYTHON names the interpreter (default python3). Peers that are not installed are a line in the
# table, and tools/pack_peers.sh carries them, and what training needs, to a machine without a
# network. Ends with 1 if a part failed, 2 for a wrong argument.
set -uo pipefail

PARTS=(doctor tests compile quick train settings ranks rounding bench tune memory peers gluon)
declare -A LIMIT=([doctor]=3 [tests]=8 [compile]=5 [quick]=4 [train]=6 [settings]=5 [ranks]=9
    [rounding]=4 [bench]=9 [tune]=9 [memory]=3 [peers]=9 [gluon]=9)
ALL=1.4B,7B,30B,README,Qwen3-30B-A3B,OLMoE-1B-7B
WORKERS=${WORKERS:-8}

wrong() { echo "$1; see --help" >&2 && exit 2; }
only=
minutes=600
out=
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
        --only) only=${2:-} && shift 2 || wrong "--only needs parts" ;;
        --minutes) minutes=${2:-} && shift 2 || wrong "--minutes needs a number" ;;
        -*) wrong "unknown option $1" ;;
        *) [[ -z $out ]] || wrong "one folder only"
           out=$1 && shift ;;
    esac
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || wrong "--minutes is $minutes; it must be a whole number from 1"
for part in ${only//,/ }; do
    [[ -n ${LIMIT[$part]:-} ]] || wrong "unknown part $part; known: ${PARTS[*]}"
done
cd "$(dirname "$0")/.."
out=${out:-docs/benchmarks}
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out/logs"
name=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))' 2>/dev/null) ||
    { echo "there is no GPU that torch can use" >&2 && exit 2; }

bench() {
    local label=$1
    shift
    "$python" tools/bench_moe.py "$@" \
        --json "$out/$name-$label.json" --picture "$out/$name-$label.png"
}
# Runs of a part lie in one folder. At its end, or at its limit, their figures are kept.
begin_runs() {
    runs=$(mktemp -d) label=$1
    trap keep_runs EXIT
    "$python" -m distmoe data prepare --builtin shakespeare --out "$runs/shakespeare"
}
train() {
    "$python" -m distmoe train configs/check_gpu.toml --run.name "$1" --run.dir "$runs/$1" \
        --data.path "$runs/shakespeare" "${@:2}"
}
keep_runs() {
    local code=$? steps operators run begun=()
    for steps in "$runs"/*/metrics.jsonl; do
        run=$(basename "$(dirname "$steps")")
        cp "$steps" "$out/logs/$label-$run.jsonl" && begun+=("$runs/$run")
        for operators in "$runs/$run"/profile/*.operators.txt; do
            [[ ! -f $operators ]] || cp "$operators" "$out/logs/$run-$(basename "$operators")"
        done
    done
    "$python" -m distmoe report "${begun[@]}" --json "$out/$name-$label.json" \
        --markdown "$out/$name-$label.md" || code=1
    rm -rf "$runs"
    exit "$code"
}
# losses_agree TOLERANCE RUN RUN...: relative, at every step that all of them have
losses_agree() {
    "$python" - "$runs" "$@" <<'EOF'
import json, sys
from pathlib import Path

folder, tolerance, *names = sys.argv[1:]
losses = []
for name in names:
    lines = map(json.loads, (Path(folder) / name / "metrics.jsonl").read_text().splitlines())
    losses.append({line["step"]: line["loss"] for line in lines if "loss" in line})
steps = set.intersection(*map(set, losses))
furthest = max((abs(own[n] / losses[0][n] - 1) for own in losses for n in steps), default=None)
print(f"{len(steps)} steps of {', '.join(names)}: relative distance of the losses {furthest}")
sys.exit(furthest is None or not furthest <= float(tolerance))
EOF
}

part_doctor() { "$python" -m distmoe doctor; }
# SonicMoE compiles for minutes at every new size: it has a part of its own. A test that hangs ends
# its process, where pytest-timeout is installed.
part_tests() {
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$WORKERS")
    "$python" -m pytest "${workers[@]}" -m "gpu or not gpu" -k "not aot and not sonicmoe and not gluon" --tb=short \
        -o timeout=120 -o timeout_method=thread --durations=10 --junitxml="$out/$name-tests.xml" \
        tests/kernels tests/moe/test_no_host_sync.py tests/moe/test_layer.py tests/moe/test_row_formats.py \
        tests/model/test_document_mask.py tests/model/test_attention.py tests/bench/test_layer_memory.py \
        tests/bench/kernels/test_pieces.py tests/bench/kernels/test_tuning.py
}
part_compile() { "$python" tools/compile_kernels.py --shapes "7B-256,TR,$ALL" &&
    "$python" tools/compile_kernels.py --shapes 7B-256,README --all-tiles; }
part_quick() { bench 7B-256 --shapes 7B-256 --backends bound,grouped_mm,triton --profile; }
part_train() {
    local failed=0
    begin_runs train || return 1
    train single --train.profile 200-201 || failed=1
    train top-k --moe.rounding.rule none || failed=1
    train fsdp2 --parallel.engine fsdp2 || failed=1
    train compiled --train.compile dense || failed=1
    return $failed
}
fp8=(--moe.dispatch.row_dtype fp8 --moe.dispatch.sum_dtype bf16)
part_settings() {
    local failed=0 short=(--train.steps 60 --train.validate_every 0)
    local exact=(--run.deterministic true --checkpoint.every 30 --checkpoint.keep_last 2)
    begin_runs settings || return 1
    train muon "${short[@]}" --optim.name muon --parallel.engine fsdp2 || failed=1
    train latent "${short[@]}" --model.attention mla || failed=1
    train documents "${short[@]}" --data.document_mask true || failed=1
    train rows "${short[@]}" "${fp8[@]}" || failed=1
    train exact "${short[@]}" "${exact[@]}" || failed=1
    train resumed "${short[@]}" "${exact[@]}" \
        --resume "$runs/exact/checkpoints/step-00000030" || failed=1
    losses_agree 0 exact resumed || failed=1
    return $failed
}
# All of a run's kinds of messages, streams and groups. Bits are equal with and without overlap; with
# other transports they may differ in the order of FSDP's sums, so losses are compared to 1e-3.
part_ranks() {
    local gpus failed=0 way run exchange overlap
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    [[ $gpus -gt 1 ]] || { echo "one GPU: nobody to exchange rows with" && return 0; }
    "$python" -m pytest -m "gpu or not gpu" -k nccl --tb=short tests/comm/test_exchange.py || failed=1
    "$python" -m distmoe doctor comm configs/check_gpu.toml --nproc "$gpus" --parallel.ep "$gpus" \
        --json "$out/$name-links.json" || failed=1
    begin_runs ranks || return 1
    for way in "defaults auto true" "waiting auto false" "p2p p2p true"; do
        read -r run exchange overlap <<<"$way"
        train "$run" --launch.nproc "$gpus" --parallel.engine fsdp2 --parallel.ep "$gpus" \
            --train.micro_batch_size 1 --train.steps 60 --checkpoint.every 20 \
            --train.profile 50-51 --train.trace_steps 55 \
            --moe.dispatch.exchange "$exchange" --moe.dispatch.overlap "$overlap" || failed=1
    done
    losses_agree 1e-3 defaults waiting p2p || failed=1
    train shared --launch.nproc "$gpus" --parallel.engine fsdp2 --parallel.ep "$gpus" \
        --parallel.cp "$gpus" --train.micro_batch_size "$gpus" --train.steps 60 "${fp8[@]}" || failed=1
    return $failed
}
part_rounding() { bench rounding --shapes TR --rounding none,balance --backends triton,grouped_mm,bound; }
part_bench() { bench all --shapes "$ALL" --rounds 10 --backends bound,grouped_mm,triton; }
part_tune() { "$python" tools/bench_moe.py --shapes 7B-256,README --config configs/eight_gpu.toml \
    --backends triton --tune --write-tiles "$out/$name-tiles.toml" --rounds 10 \
    --json "$out/$name-tiles.json"; }
part_memory() { "$python" tools/measure_memory.py --json "$out/$name-memory.json"; }
part_peers() {
    local failed=0 peer
    for peer in liger sonicmoe sonicmoe-layer; do
        bench "$peer" --shapes 7B-256 --backends "bound,triton,$peer" || failed=1
    done
    return $failed
}

part_gluon() {
    "$python" -m pytest -m "gpu or not gpu" -k "gluon and not interpreter" --tb=short -x \
        -o faulthandler_timeout=120 tests/kernels &&
        bench gluon --shapes 7B-256,README --backends bound,triton,gluon
}

# timeout starts programs, and parts are functions: the script calls itself for one. A part that is
# interrupted begins nothing more.
if [[ -n ${DISTMOE_PART:-} ]]; then
    trap 'exit 124' INT
    "part_$DISTMOE_PART"
    exit
fi
failed=0
summary=()
for part in "${PARTS[@]}"; do
    [[ -z $only || ,$only, == *,$part,* ]] || continue
    left=$((60 * minutes - SECONDS)) limit=$((60 * LIMIT[$part])) begun=$SECONDS
    if [[ $left -le 0 ]]; then
        summary+=("$part: left out, no time") failed=1
        continue
    fi
    echo "== $part"
    DISTMOE_PART=$part timeout --signal=INT --kill-after=30 $((left < limit ? left : limit)) \
        tools/check_gpu.sh "$out" 2>&1 | tee "$out/logs/$part.log"
    code=${PIPESTATUS[0]}
    ended="ended with $code"
    [[ $code -eq 0 ]] && ended=well
    [[ $code -eq 124 || $code -eq 137 ]] && ended="stopped at its limit"
    [[ $code -eq 0 ]] || failed=1
    summary+=("$part: $ended, $((SECONDS - begun)) s")
done
echo "== summary: $name, $out"
printf '%s\n' "${summary[@]}"
exit $failed
