#!/bin/sh
# The kernels' own tests for aarch64: cross-compiled and run under qemu, on a CPU with BF16 and one
# without, and their bits compared with those of AVX2 on this machine. On an aarch64 machine:
# compiled and run, no more.
#
#   tests/kernels/aarch64.sh [--require] [--native PROGRAM]
#
# --require: missing tools are an error, else they skip (exit status 77).
# --native: kernels_test already built for this machine, which saves building it.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
missing=77
native=
while [ $# -gt 0 ]; do
    case $1 in
    --require) missing=1 ;;
    --native) shift; native=${1:?--native needs a program} ;;
    *) echo "usage: $0 [--require] [--native PROGRAM]" >&2; exit 2 ;;
    esac
    shift
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

bits() { # instruction set, file: a line "dtype_arithmetic hash" for each
    sed -n "s/^bits \([a-z0-9_]*\) $1 /\1 /p" "$2"
}

case $(uname -m) in
aarch64 | arm64)
    "$here/build.sh" "${CC:-gcc}" "$work/kernels_test"
    "$work/kernels_test" --bits
    exit
    ;;
esac

cross=aarch64-linux-gnu-gcc
prefix=/usr/aarch64-linux-gnu # where Debian's cross packages put the C library
if ! command -v $cross >/dev/null || ! command -v qemu-aarch64 >/dev/null ||
    ! echo '#include <stdio.h>' | $cross -E -xc - >/dev/null 2>&1; then
    echo "aarch64.sh needs the Debian packages gcc-aarch64-linux-gnu libc6-dev-arm64-cross" \
        "qemu-user" >&2
    exit $missing
fi

"$here/build.sh" $cross "$work/aarch64"
# Both at a time. BF16 is there from qemu 6.1 on.
qemu-aarch64 -cpu max -L $prefix "$work/aarch64" --bits --brief neon >"$work/neon.txt" &
neon=$!
status=0
qemu-aarch64 -cpu max -L $prefix "$work/aarch64" --bits --brief neon_bf16 >"$work/bf16.txt" 2>&1 ||
    status=$?
wait $neon || status=$?
cat "$work/neon.txt" "$work/bf16.txt"
[ $status -eq 0 ] || exit $status
if qemu-aarch64 -cpu cortex-a72 -L $prefix "$work/aarch64" neon_bf16 >"$work/a72.txt" 2>&1 ||
    ! grep -q 'no kernels for neon_bf16' "$work/a72.txt"; then
    echo "a CPU without BF16 counts as one that has it" >&2
    exit 1
fi

if [ "$(uname -m)" != x86_64 ] || ! grep -qw avx2 /proc/cpuinfo || ! grep -qw fma /proc/cpuinfo; then
    echo "bits not compared: this machine has no AVX2"
    exit 0
fi
if [ -z "$native" ]; then
    native=$work/native
    "$here/build.sh" "${CC:-gcc}" "$native"
fi
"$native" --bits --brief avx2 >"$work/avx2.txt" || status=$?
[ $status -eq 0 ] || { cat "$work/avx2.txt"; exit $status; }
if [ -z "$(bits neon "$work/neon.txt")" ] ||
    [ "$(bits neon "$work/neon.txt")" != "$(bits avx2 "$work/avx2.txt")" ]; then
    echo "NEON and AVX2 disagree:" >&2
    grep -h '^bits' "$work/neon.txt" "$work/avx2.txt" >&2
    exit 1
fi
echo "NEON and AVX2 agree in every bit"
