#!/bin/sh
# What a GPU host has to show: gpu.sh BIN_DIR TESTS_DIR [PART ...], from the source root or an unpacked test bundle. The parts, where none
# is named all but the last: `one` (one GPU: operators, goldens, perplexity), `ranks` (gpu_ranks.sh for two and for four GPUs, as far as the
# host has them), `cluster` (gpu_cluster.sh, likewise) and `sanitize` (the operators under compute-sanitizer, on the path). TM_SHARED: the
# full test data, optional. Every step has a time limit, and one that fails does not stop the others.
set -u
BIN=$1
TESTS=$2
shift 2
PARTS=" ${*:-one ranks cluster} "
for p in $PARTS; do
    case $p in
    one | ranks | cluster | sanitize) ;;
    *) echo "gpu-test: no part '$p' (one, ranks, cluster, sanitize)" >&2; exit 2 ;;
    esac
done
[ -d /usr/local/cuda/lib64 ] && export LD_LIBRARY_PATH="/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
GPUS=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | grep -c .)
[ "$GPUS" -gt 0 ] || { echo "gpu-test: this host has no GPU that nvidia-smi knows" >&2; exit 1; }
failed=0
grace=3 # seconds from SIGTERM to SIGKILL

part() { # seconds, name, command ...
    limit=$1
    name=$2
    shift 2
    echo "== $name"
    begin=$(date +%s)
    timeout -k "$grace" "$limit" "$@" 2>&1
    rc=$?
    [ $rc = 0 ] || failed=$((failed + 1))
    echo "== $name: exit $rc after $(($(date +%s) - begin)) s"
}

# 34.199 +- 0.3 %: what the reference implementation gives.
perplexity() {
    got=$("$BIN/turbomesh" score models/demo-20m --tokens models/demo-20m/eval/heldout_tokens.npy \
        --device cuda --json) || return 1
    echo "$got" | sed 's/.*"perplexity": *\([0-9.]*\).*/\1/' |
        awk '{ print "perplexity " $1; exit !($1 > 34.096 && $1 < 34.302) }'
}

wanted() { case $PARTS in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

one_gpu() {
    for t in op_cuda_test op_cuda_linear_test op_cuda_attention_test op_cuda_families_test op_cuda_sample_test model_test scale_test; do
        part 180 "$t" "$TESTS/$t"
    done
    TM_TEST='test_one*' part 180 engine_device_test "$TESTS/engine_device_test"
    TM_FAMILIES_CUDA=only part 300 "families_test, one GPU and two" "$TESTS/families_test"
    echo "== perplexity"
    perplexity || { echo "== perplexity: failed"; failed=$((failed + 1)); }
}

several_gpus() {
    for ranks in 2 4; do
        if [ "$GPUS" -ge $ranks ]; then
            "$(dirname "$0")/gpu_ranks.sh" "$BIN" "$TESTS" $ranks || failed=$((failed + $?))
        fi
    done
}

# A cluster under load, one rank killed. TM_GPU_CLUSTER_SECONDS: how long the largest one that fits, a smaller one half a minute;
# TM_GPU_CLUSTER_MODEL: of which model.
clusters() {
    grace=60
    for tp in 1 2; do
        [ "$GPUS" -ge $((2 * tp)) ] || continue
        seconds=30
        [ "$GPUS" -ge $((4 * tp)) ] || seconds=${TM_GPU_CLUSTER_SECONDS:-30}
        part $((seconds + 400)) "cluster, 2 groups of tp $tp" "$(dirname "$0")/gpu_cluster.sh" "$BIN" --device cuda \
            --groups 2 --tp $tp --seconds "$seconds" --model "${TM_GPU_CLUSTER_MODEL:-models/demo-20m}"
    done
}

# What a tool says about kernels of ours, which all lie in unnamed namespaces, is a failure; cuBLAS's own are only counted,
# since nothing here could mend them.
watched() { # tool, test, further options ...
    tool=$1
    test=$2
    shift 2
    log=$(mktemp)
    timeout -k "$grace" 600 compute-sanitizer --tool "$tool" --report-api-errors no "$@" "$TESTS/$test" >"$log" 2>&1
    rc=$?
    others=$(grep -c 'Race reported' "$log")
    ours=$(grep -A1 'Race reported' "$log" | grep -Ec '<unnamed>::|anonymous namespace|_GLOBAL__N')
    others=$((others - ours / 2))
    grep -h 'SUMMARY\|FAILED\|Internal' "$log"
    echo "$others reports of other libraries' kernels, $ours lines about ours"
    if [ $rc != 0 ] || [ "$ours" != 0 ] || grep -q 'FAILED\|Internal Sanitizer\|Invalid __\|skipped:' "$log"; then
        tail -n 40 "$log"
        rm -f "$log"
        return 1
    fi
    rm -f "$log"
}

sanitized() {
    for t in op_cuda_test op_cuda_linear_test op_cuda_attention_test op_cuda_families_test op_cuda_sample_test; do
        echo "== memcheck $t"
        watched memcheck $t --error-exitcode 1 || { echo "== memcheck $t: failed"; failed=$((failed + 1)); }
        echo "== racecheck $t"
        # Tests that draw their cases take some of them: each is hundreds of times as slow.
        TM_FEW=${TM_FEW:-50} watched racecheck $t || { echo "== racecheck $t: failed"; failed=$((failed + 1)); }
    done
}

if wanted one; then one_gpu; fi
if wanted ranks; then several_gpus; fi
if wanted cluster; then clusters; fi
if wanted sanitize; then sanitized; fi
echo "== gpu-test: $failed failures on $GPUS GPUs"
[ "$failed" = 0 ]
