#!/bin/sh
# What several GPUs of one host have to show, on a host that has them: gpu_ranks.sh BIN_DIR TESTS_DIR [RANKS]
# BIN_DIR has turbomesh and tm-bench-cuda, TESTS_DIR the test programs; run from the source root (models/demo-20m).
# TM_SHARED: the full test data, optional. Every part has a time limit, and one that fails does not stop the others;
# the exit code is the number of failures.
set -u
BIN=$1
TESTS=$2
RANKS=${3:-2}
export TM_RANKS="$RANKS" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 NCCL_NVLS_ENABLE=0
MPIRUN=${TM_MPIRUN:-mpirun}
failed=0

part() { # seconds, name, command ...
    limit=$1
    name=$2
    shift 2
    echo "== $name"
    begin=$(date +%s)
    timeout -k 3 "$limit" "$@" 2>&1
    rc=$?
    [ $rc = 0 ] || failed=$((failed + 1))
    echo "== $name: exit $rc after $(($(date +%s) - begin)) s"
}

# One way alone first: should the machine be wrong, that is known within seconds.
TM_REPEAT=200 TM_TEST=test_two part 40 "sums, two meetings" "$TESTS/device_comm_test"
TM_REPEAT=10000 TM_TEST=test_auto part 90 "sums, by size, 10000 replays" "$TESTS/device_comm_test"
for way in push one nccl refused dies late; do
    TM_REPEAT=1000 TM_TEST=test_$way part 60 "sums: $way" "$TESTS/device_comm_test"
done
TM_TEST=test_demo part 60 "model: $RANKS ranks against one" "$TESTS/device_model_test"
TM_TEST=test_demo TM_COLLECTIVES=nccl part 60 "model: NCCL alone" "$TESTS/device_model_test"
TM_TEST=test_families part 120 "families: $RANKS ranks against one" "$TESTS/device_model_test"
TM_TEST='test_ranks*' part 120 "engine, $RANKS ranks" "$TESTS/engine_device_test"
for tp in 1 "$RANKS"; do
    part 60 "perplexity, tp $tp" "$BIN/turbomesh" score models/demo-20m \
        --tokens models/demo-20m/eval/heldout_tokens.npy --device cuda --tp "$tp"
done
part 90 "allreduce" "$MPIRUN" -n "$RANKS" --oversubscribe --bind-to none "$BIN/tm-bench-cuda" allreduce
for batch in 1 32; do
    part 120 "llama3-8b tp $RANKS batch $batch" "$BIN/turbomesh" bench engine --arch llama3-8b --device cuda --tp "$RANKS" \
        --batch $batch --context 1024 --steps 64 --repeat 2
done
# 141 GB of weights.
if [ "$RANKS" -ge 4 ]; then
    for batch in 1 32; do
        part 240 "llama3-70b tp $RANKS batch $batch" "$BIN/turbomesh" bench engine --arch llama3-70b --device cuda \
            --tp "$RANKS" --batch $batch --context 1024 --steps 64 --repeat 2
    done
fi
echo "== $failed failures"
exit $failed
