#!/usr/bin/env bash
# What was trained on ImageNet (else it is trained first), or on SOURCE, on a shifted test set; seeds 1, 2, 3.
set -euo pipefail

if (($# < 2)); then
    echo "usage: [DATA=FOLDER] [TRAINER=NAME] [SHOTS=16] [SOURCE=imagenet] $0 DATASET CFG [options of scripts/protocol.py] [KEY VALUE ...]" >&2
    exit 2
fi
exec "${PYTHON:-python}" "$(dirname "$0")/../protocol.py" ood \
    --source "${SOURCE:-imagenet}" --targets "$1" --config "$2" --shots "${SHOTS:-16}" \
    --trainers "${TRAINER:-DLRCLIP}" ${DATA:+--root "$DATA"} "${@:3}"
