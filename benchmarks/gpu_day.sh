#!/usr/bin/env bash
# A GPU's figures in at most eight minutes, without a network: output/gpu_day/gpu_day.json.
#
#   benchmarks/gpu_day.sh [--minutes 8] [--parts facts,steps] [--out output/gpu_day]
#
# PYTHON chooses the interpreter (default: python).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-16}"
exec "${PYTHON:-python}" benchmarks/gpu_day.py "$@"
