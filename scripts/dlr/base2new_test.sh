#!/usr/bin/env bash
# Test on the second half of the classes of what base2new_train.sh has trained (else it is trained first).
set -euo pipefail

if (($# < 2)); then
    echo "usage: [DATA=FOLDER] [TRAINER=NAME] [CFG=vit_b16] [SHOTS=16] $0 DATASET SEED [options of scripts/protocol.py] [KEY VALUE ...]" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "$0")/../protocol.py" base2new \
    --dataset "$1" --seeds "$2" --config "${CFG:-vit_b16}" --shots "${SHOTS:-16}" \
    --trainers "${TRAINER:-DLRCLIP}" ${DATA:+--root "$DATA"} "${@:3}"
