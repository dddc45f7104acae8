#!/usr/bin/env bash
# All variants of scripts/lib/ablations.py with seeds 1, 2, 3.
set -euo pipefail

if (($# < 3)); then
    echo "usage: [DATA=FOLDER] [TRAINER=NAME] $0 DATASET CFG SHOTS [options of scripts/protocol.py] [KEY VALUE ...]" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "$0")/../protocol.py" ablation \
    --dataset "$1" --config "$2" --shots "$3" \
    --trainers "${TRAINER:-DLRCLIP}" ${DATA:+--root "$DATA"} "${@:4}"
