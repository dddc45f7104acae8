#!/usr/bin/env bash
# Time a newcomer's first hour: clone, install, the README's main command, own photographs, a comparison, the report.
#
#     scripts/dev/first_hour.sh [FOLDER]
#
# FOLDER (default: a temporary one) must not exist; it keeps the clone, its virtual environment and all outputs. Each
# step's seconds, and the lines that it prints on the console, stand in FOLDER/first_hour.md. Photographs are stood in
# for by 20 handwritten digits of each class, and OpenAI's ViT-B/32 by the tiny CLIP: neither can be fetched everywhere.
set -euo pipefail

source_folder="$(cd "$(dirname "$0")/../.." && pwd)"
folder="${1:-$(mktemp -d)/first_hour}"
if [ -e "$folder" ]; then
    echo "error: Expected a new folder but there is $folder" >&2
    exit 2
fi
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
table="$folder/first_hour.md"
printf '| step | seconds | lines on stdout |\n|---|---:|---:|\n' > "$table"

step() { # step NAME COMMAND...: what it prints goes to a file of its own
    local name="$1" start
    shift
    printed="$folder/step$(wc -l < "$table").txt" # of the latest step
    start="$(date +%s)"
    if ! "$@" > "$printed" 2> "$printed.err"; then
        echo "failed: $name" >&2
        tail -n 20 "$printed" "$printed.err" >&2
        exit 1
    fi
    printf '| %s | %s | %s |\n' "$name" "$(($(date +%s) - start))" "$(wc -l < "$printed")" | tee -a "$table"
}

export DLR_CLIP_CACHE="$folder/cache" # a newcomer has none
step "git clone" git clone --quiet "$source_folder" "$folder/clone"
cd "$folder/clone"
step "virtual environment" "${PYTHON:-python3}" -m venv "$folder/venv"
# shellcheck disable=SC1091
source "$folder/venv/bin/activate"
step "pip install -e ." pip install --quiet -e .
step "train.py --help" python train.py --help
step "DLRCLIP on Digits, 16 images of each class" python train.py --trainer DLRCLIP --config-file configs/trainers/dlr/tiny.yaml
before="$(($(grep -n '^Elapsed' "$printed" | cut -d: -f1) - 1))"

cat > "$folder/make_photos.py" <<'PYTHON'
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

NAMES = "zero one two three four five six seven eight nine".split()
digits, counts = load_digits(), [0] * 10
for pixels, label in zip(digits.images, digits.target):
    if counts[label] < 22:  # the last two of each class are new photos, not trained on
        part = "my_photos" if counts[label] < 20 else "new_photos"
        path = Path(sys.argv[1], part, NAMES[label], f"{counts[label]}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 - 15.9 * pixels).astype("uint8")).resize((96, 96)).save(path)
        counts[label] += 1
PYTHON
step "200 photos" python "$folder/make_photos.py" .
step "DLRCLIP on own photos" python train.py --root my_photos --trainer DLRCLIP --config tiny --output-dir output/my_photos/dlr
step "predict 20 new photos" python predict.py --model-dir output/my_photos/dlr new_photos
step "compare three methods on own photos" python scripts/compare.py --dataset image_folder --root my_photos \
    --trainers ZeroshotCLIP,LinearProbe,GDA --shots 1,4 --seeds 1,2,3
step "report of all runs" python scripts/report.py output --output report.html
printf '\nLines of the first run before its training has ended: %s\n' "$before" >> "$table"
echo "$table"
