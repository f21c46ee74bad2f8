#!/bin/sh
# Builds kernels_test with the flags of setup.py, as many files at a time as there are processors:
#
#   tests/kernels/build.sh COMPILER PROGRAM [OBJECTS]
#
# OBJECTS: the folder in which a build has left the objects of flashcpu/kernels, build/temp.*/*/
# flashcpu/kernels; else they are compiled here, which takes most of the time.
set -eu

compiler=$1
program=$2
objects=${3:-}
tests=$(cd "$(dirname "$0")" && pwd)
kernels=$tests/../../flashcpu/kernels
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

if [ -n "$objects" ]; then
    set -- "$tests"
else
    set -- "$tests" "$kernels"
fi
find "$@" -name '*.c' -print0 |
    xargs -0 -n 1 -P "$(getconf _NPROCESSORS_ONLN)" sh -c '
        $1 -std=gnu11 -O3 -ffp-contract=off -I"$2" -c "$4" -o "$3/$(basename "$4" .c).o"
    ' compile "$compiler" "$kernels" "$work"
if [ -n "$objects" ]; then
    cp "$objects"/*.o "$objects"/isa/*.o "$work"
fi
$compiler "$work"/*.o -lm -o "$program"
