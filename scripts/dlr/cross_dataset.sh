#!/usr/bin/env bash
# What was trained on ImageNet (else it is trained first), or on SOURCE, on another dataset as it is.
set -euo pipefail

if (($# < 2)); then
    echo "usage: [DATA=FOLDER] [TRAINER=NAME] [CFG=vit_b16] [SHOTS=16] [SOURCE=imagenet] $0 DATASET SEED [options of scripts/protocol.py] [KEY VALUE ...]" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "$0")/../protocol.py" cross-dataset \
    --source "${SOURCE:-imagenet}" --targets "$1" --seeds "$2" --config "${CFG:-vit_b16}" --shots "${SHOTS:-16}" \
    --trainers "${TRAINER:-DLRCLIP}" ${DATA:+--root "$DATA"} "${@:3}"
