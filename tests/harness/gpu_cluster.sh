#!/bin/sh
# A whole cluster on this host under load, one rank killed in the middle: gpu_cluster.sh BIN_DIR [options], `--help`
# lists them. BIN_DIR has turbomesh, turbomesh-router, turbomesh-worker and, where PATH has none, etcd; libraries that
# the host lacks lie in BIN_DIR/../lib. Needs python3 (nothing beside it) and, for --tp over 1, mpirun.
set -eu
[ $# -ge 1 ] || { echo "usage: gpu_cluster.sh BIN_DIR [options]" >&2; exit 2; }
TM_BIN=$(cd "$1" && pwd)
shift
path() { [ ! -d "$1" ] || export LD_LIBRARY_PATH="$1${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"; }
path /usr/local/cuda/lib64
# Only where the programs do not find their libraries by themselves: mpirun and python3 keep the host's.
"$TM_BIN/turbomesh" version >/dev/null 2>&1 || path "$TM_BIN/../lib"
"$TM_BIN/turbomesh" version >/dev/null
export TM_BIN PATH="$PATH:$TM_BIN" PYTHONDONTWRITEBYTECODE=1
# NVLink multicast is off: it hangs where a host's fabric manager does not allow it.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 NCCL_NVLS_ENABLE=0
exec python3 "$(dirname "$0")/gpu_cluster.py" "$@"
