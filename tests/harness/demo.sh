#!/bin/sh
# The demonstration cluster on one machine: etcd, two mpirun groups of two ranks, the router, one question.
# Usage: demo.sh BIN_DIR [--once]. Everything it starts ends with it.
set -eu
BIN=$1
shift
ONCE=0
for a in "$@"; do
    case $a in
    --once) ONCE=1 ;;
    *) echo "demo: unknown argument '$a' (only --once)" >&2; exit 2 ;;
    esac
done
[ -t 0 ] && [ -t 2 ] || ONCE=1 # without a terminal nobody could stop it
MODEL=models/demo-20m
DIR=$(mktemp -d "${TMPDIR:-/tmp}/turbomesh-demo.XXXXXX")
PIDS=

stop_all() {
    trap - EXIT INT TERM
    for sig in TERM KILL; do
        for p in $PIDS; do kill -$sig "$p" 2>/dev/null || true; done
        i=0
        while [ $i -lt 60 ]; do
            alive=0
            for p in $PIDS; do kill -0 "$p" 2>/dev/null && alive=1; done
            [ $alive = 0 ] && break 2
            sleep 0.1
            i=$((i + 1))
        done
    done
    rm -rf "$DIR"
}
trap 'stop_all' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

free_port() { "$BIN/turbomesh" free-port "$1"; }

start() { # name command...
    name=$1
    shift
    "$@" >"$DIR/$name.log" 2>&1 </dev/null &
    PIDS="$PIDS $!"
    eval "PID_$name=$!"
}

T0=$(date +%s)
wait_for() { # what pid-name command...
    what=$1
    pid=$(eval "echo \$PID_$2")
    name=$2
    shift 2
    while ! "$@" >/dev/null 2>&1; do
        if ! kill -0 "$pid" 2>/dev/null; then
            printf '\n%s ended before it was ready; its log:\n' "$what" >&2
            tail -n 30 "$DIR/$name.log" >&2
            exit 1
        fi
        [ $(($(date +%s) - T0)) -gt 120 ] && { printf '\n%s did not get ready in 120 s\n' "$what" >&2; tail -n 30 "$DIR/$name.log" >&2; exit 1; }
        [ -t 2 ] && printf '\r  waiting for %-28s %3ss ' "$what" $(($(date +%s) - T0)) >&2
        sleep 0.1
    done
    [ -t 2 ] && printf '\r' >&2
    printf '  ready: %-40s\n' "$what" >&2
}

# State 3 of the metric is "ready" (its HELP line lists them).
group_ready() { curl -sf "$URL/metrics" | grep -q "^turbomesh_group_state{group=\"$1\"} 3"; }

ETCD_PORT=$(free_port 2379)
PEER_PORT=$(free_port 2380)
HTTP_PORT=$(free_port 8000)
ETCD=http://127.0.0.1:$ETCD_PORT
URL=http://127.0.0.1:$HTTP_PORT

start etcd etcd --name demo --data-dir "$DIR/etcd" --listen-client-urls "$ETCD" --advertise-client-urls "$ETCD" \
    --listen-peer-urls "http://127.0.0.1:$PEER_PORT" --initial-advertise-peer-urls "http://127.0.0.1:$PEER_PORT" \
    --initial-cluster "demo=http://127.0.0.1:$PEER_PORT" --logger zap --log-level warn
wait_for "etcd on $ETCD_PORT" etcd curl -sf "$ETCD/health"

export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
for g in a b; do
    start "group_$g" mpirun -n 2 --oversubscribe --bind-to none \
        "$BIN/turbomesh-worker" "$MODEL" --tp 2 --etcd "$ETCD" --group "demo-$g"
done
start router "$BIN/turbomesh-router" --etcd "$ETCD" --port "$HTTP_PORT"
for g in a b; do
    wait_for "group demo-$g (2 ranks)" "group_$g" group_ready "demo-$g"
done
wait_for "router on $HTTP_PORT" router curl -sf "$URL/readyz"

QUESTION='What is the capital of France?'
printf '\n> %s\n' "$QUESTION" >&2
"$BIN/turbomesh" client "$URL" --prompt "$QUESTION" --temperature 0
cat >&2 <<EOF

  API      $URL/v1/chat/completions   (OpenAI protocol)
  health   $URL/health
  metrics  $URL/metrics
EOF
[ $ONCE = 1 ] && exit 0
printf '  logs     %s\n  stop     Ctrl-C\n' "$DIR" >&2
while kill -0 "$PID_router" 2>/dev/null; do sleep 1; done
echo "the router ended; its log:" >&2
tail -n 20 "$DIR/router.log" >&2
exit 1
