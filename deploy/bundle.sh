#!/bin/sh
# One relocatable tarball for hosts that reach no package registry: programs, the libraries that a bare GPU host
# lacks, the demo model. Usage: deploy/bundle.sh BUILD_DIR OUT.tar.gz [--test]
# --test adds the test programs, the cluster tests and etcd.
#
# What stays the host's: the C and C++ run-time libraries, the CUDA driver and toolkit libraries, NCCL and Open MPI.
# The programs carry an old-style RPATH of $ORIGIN/../lib, which also holds for the libraries they bring.
set -eu
BUILD=$1
OUT=$2
TEST=${3:-}
case $TEST in
'' | --test) ;;
*) echo "bundle: unknown argument '$TEST' (only --test)" >&2; exit 2 ;;
esac
HOST_LIBS='^(ld-linux|libc|libm|libdl|librt|libpthread|libresolv|libgcc_s|libstdc\+\+|libcuda|libcudart|libcublas|libcublasLt|libnvrtc|libnvidia-ml|libnccl|libmpi|libopen-pal|libopen-rte|libpmix|libhwloc|libudev)[.-]'
NAME=$(basename "$OUT" .tar.gz)
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT
TOP=$DIR/$NAME
mkdir -p "$TOP/bin" "$TOP/lib" "$TOP/models"

cp "$BUILD/bin/turbomesh" "$BUILD/bin/turbomesh-router" "$BUILD/bin/turbomesh-worker" "$TOP/bin/"
cp README.md "$TOP/"
cp -r models/demo-20m "$TOP/models/"
if [ -n "$TEST" ]; then
    mkdir -p "$TOP/build/tests"
    for f in "$BUILD"/bin/* "$BUILD"/tests/*; do
        if [ -f "$f" ] && [ -x "$f" ]; then
            case $f in
            */bin/*) cp "$f" "$TOP/bin/" ;;
            *) cp "$f" "$TOP/build/tests/" ;;
            esac
        fi
    done
    cp -r dev tests bench proto docs "$TOP/"
    cp "$(command -v etcd)" "$(command -v etcdctl)" "$TOP/bin/"
    ln -s ../bin "$TOP/build/bin"
fi
strip --strip-unneeded "$TOP"/bin/* 2>/dev/null || true # etcd comes stripped
[ -z "$TEST" ] || strip --strip-unneeded "$TOP"/build/tests/*

# ldd prints the whole tree of needed libraries.
find "$TOP" -type f -perm -u+x | while read -r f; do ldd "$f" 2>/dev/null || true; done |
    awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u | while read -r lib; do
    if ! basename "$lib" | grep -Eq "$HOST_LIBS"; then cp -Ln "$lib" "$TOP/lib/"; fi
done
tar -C "$DIR" -czf "$OUT" "$NAME"
echo "$OUT: $(du -h "$OUT" | cut -f1), $(find "$TOP/lib" -type f | wc -l) libraries" >&2
