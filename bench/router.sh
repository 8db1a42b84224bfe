#!/bin/sh
# The router's own figures, with a fake worker on loopback: what it adds to the time to the first byte at 200
# requests/s, open streams held, the memory they take, forwarded tokens per second.
#
# Usage: bench/router.sh [BIN_DIR]    One line of JSON for each figure. CSV=file appends rows to that file.
#
# "Added" is a difference: the first byte over the router less the first token of the same worker asked directly
# (tm-direct-client), both at the same rate in the same run, in turns, the middle of ROUNDS each. RT=1 runs the
# programs above everything else on the machine (chrt), for a machine that others use too.
set -eu
cd "$(dirname "$0")/.."
BIN=${1:-build/bin}
ROUNDS=${ROUNDS:-5}
DIR=$(mktemp -d)
ulimit -n "$(ulimit -Hn)"
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
WORKER=$(free_port)
PORT=$(free_port)
URL=http://127.0.0.1:$PORT
AT=
[ "${RT:-0}" = 1 ] && AT="chrt -r 5"
PIDS=
stop() {
    [ -n "$PIDS" ] && kill $PIDS 2>/dev/null
    wait 2>/dev/null || true
    PIDS=
}
trap 'stop; rm -rf "$DIR"' EXIT
trap 'exit 1' INT TERM PIPE

serve() { # time of a step
    $AT "$BIN/tm-fake-worker" models/demo-20m --port "$WORKER" --step-delay "$1" --log-level warn >"$DIR/worker.log" 2>&1 &
    PIDS=$!
    $AT "$BIN/turbomesh-router" --workers "127.0.0.1:$WORKER" --port "$PORT" --log-level warn >"$DIR/router.log" 2>&1 &
    ROUTER=$!
    PIDS="$PIDS $ROUTER"
    i=0
    until curl -sf "$URL/readyz" >/dev/null 2>&1; do
        i=$((i + 1))
        [ $i -gt 200 ] && { cat "$DIR"/*.log >&2; exit 1; }
        sleep 0.05
    done
}
load() { $AT "$BIN/turbomesh" bench http "$URL" --json "$@"; }
value() { sed -n "s/.*\"$1\": *\([0-9.]*\).*/\1/p"; } # of a line of JSON
middle() { sort -n | awk '{v[NR] = $1} END {print v[int((NR + 1) / 2)]}'; }
row() { # figure value unit bar note
    printf '{"figure": "%s", "value": %s, "unit": "%s", "bar": "%s", "note": "%s"}\n' "$1" "$2" "$3" "$4" "$5"
    [ -z "${CSV:-}" ] && return
    [ -s "$CSV" ] || echo 'date,commit,figure,value,unit,bar,note' >"$CSV"
    printf '%s,%s,%s,%s,%s,%s,"%s"\n' "$(date -u +%F)" "$(git rev-parse --short HEAD 2>/dev/null || echo -)" "$1" "$2" "$3" "$4" "$5" >>"$CSV"
}

HOW="RT=${RT:-0} ROUNDS=$ROUNDS bench/router.sh; $(nproc) cores of $(sed -n 's/^model name.*: //p' /proc/cpuinfo | head -n 1); load average $(cut -d' ' -f1 /proc/loadavg) before"
serve 0ms
for i in $(seq "$ROUNDS"); do
    $AT "$BIN/tm-direct-client" "127.0.0.1:$WORKER" 200 1000 8 >"$DIR/direct.$i"
    load --rate 200 --requests 1000 --streams 256 --max-tokens 8 >"$DIR/router.$i"
done
for p in 50 99; do
    direct=$(cat "$DIR"/direct.* | value "ttft_ms_p$p" | middle)
    router=$(cat "$DIR"/router.* | value "ttfb_ms_p$p" | middle)
    row "added_ttfb_p$p" "$(awk "BEGIN {printf \"%.3f\", $router - $direct}")" ms "<= $([ $p = 50 ] && echo 0.5 || echo 2)" \
        "first byte over the router $router ms less first token of the worker asked directly $direct ms at 200 req/s; middle of $ROUNDS; $HOW"
done
load --requests 256 --streams 64 --max-tokens 1900 --duration 30s >"$DIR/tokens.json"
row forwarded_tokens "$(value tokens_per_s <"$DIR/tokens.json" | cut -d. -f1)" tokens/s ">= 100000" "64 SSE streams; $(value tokens <"$DIR/tokens.json") tokens in $(value content_events <"$DIR/tokens.json") events; $HOW"
stop
serve 100ms
load --requests 2000 --streams 2000 --max-tokens 150 --duration 60s >"$DIR/streams.json" &
LOAD=$!
sleep 10
open=$(curl -s "$URL/health" | value active)
row open_streams "$open" streams ">= 2000" "one token each every 100 ms; $HOW"
row rss "$(awk '/VmRSS/ {printf "%.1f", $2 / 1024}' "/proc/$ROUTER/status")" MiB "<= 200" "resident memory with $open open streams; $HOW"
wait "$LOAD" || true
failed=$(value requests_failed <"$DIR/streams.json")
[ "$failed" = 0 ] || { echo "$failed of the open streams failed" >&2; exit 1; }
