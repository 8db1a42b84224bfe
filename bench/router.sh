#!/bin/sh
# The router's own figures, with a fake worker on loopback that answers at once: added time to first byte at
# 200 requests/s, open streams held and the memory they take, forwarded tokens per second.
# Usage: bench/router.sh [BIN_DIR]   (prints one JSON line for each figure)
set -eu
cd "$(dirname "$0")/.."
BIN=${1:-build/bin}
DIR=$(mktemp -d)
ulimit -n "$(ulimit -Hn)"
WORKER=$("$BIN/turbomesh" free-port 0)
PORT=$("$BIN/turbomesh" free-port 0)
URL=http://127.0.0.1:$PORT
stop() { kill $PIDS 2>/dev/null || true; wait 2>/dev/null || true; }
PIDS=
trap 'stop; rm -rf "$DIR"' EXIT

serve() { # fake worker's arguments
    PIDS=
    "$BIN/tm-fake-worker" --port "$WORKER" --model models/demo-20m "$@" >"$DIR/worker.log" 2>&1 &
    PIDS="$PIDS $!"
    "$BIN/turbomesh-router" --workers "127.0.0.1:$WORKER" --port "$PORT" --log-level warn >"$DIR/router.log" 2>&1 &
    ROUTER=$!
    PIDS="$PIDS $ROUTER"
    i=0
    until curl -sf "$URL/readyz" >/dev/null 2>&1; do
        i=$((i + 1))
        [ $i -gt 200 ] && { cat "$DIR"/*.log >&2; exit 1; }
        sleep 0.05
    done
}
row() { printf '{"figure": "%s", ' "$1"; sed 's/^{//'; }

serve --step-ms 0
"$BIN/turbomesh" bench http "$URL" --rate 200 --requests 2000 --streams 256 --max-tokens 8 --json | row added_time_to_first_byte
"$BIN/turbomesh" bench http "$URL" --requests 512 --streams 64 --max-tokens 1900 --duration 30s --json | row forwarded_tokens
stop
serve --step-ms 100
"$BIN/turbomesh" bench http "$URL" --requests 2000 --streams 2000 --max-tokens 200 --duration 60s --json >"$DIR/streams.json" &
sleep 12
printf '{"figure": "router_memory", "streams": %s, "rss_mib": %s}\n' "$(curl -s "$URL/health" | sed 's/.*"active": *\([0-9]*\).*/\1/')" \
    "$(awk '/VmRSS/ {printf "%.1f", $2 / 1024}' "/proc/$ROUTER/status")"
wait $! || true
row open_streams <"$DIR/streams.json"
