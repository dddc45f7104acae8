#!/usr/bin/env bash
# All benchmarks one after the other on an otherwise idle machine, then the tables of docs/PERFORMANCE.md.
#
#   benchmarks/run_all.sh          two CPU threads, fp32
#   benchmarks/run_all.sh cuda     a GPU, bf16, more batch sizes
#
# PYTHON chooses the interpreter (default: python), OUT the folder of the results files (default: output/benchmarks).
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
out="${OUT:-output/benchmarks}"

if [[ "${1:-cpu}" == cuda ]]; then
    common=(--model ViT-B/16 --device cuda --precision bf16)
    for classes in 10 100 1000; do
        for batch in 16 32 128; do
            "$python" benchmarks/bench_step.py "${common[@]}" --classes "$classes" --batch "$batch" --steps 10 \
                --json "$out/step_cuda_${classes}_${batch}.json"
        done
        "$python" benchmarks/bench_eval.py "${common[@]}" --classes "$classes" --images 1000 \
            --json "$out/eval_cuda_$classes.json"
    done
else
    common=(--model ViT-B/16 --threads 2)
    "$python" benchmarks/bench_step.py "${common[@]}" --classes 100 --batch 16 --steps 3 --json "$out/step_100.json"
    "$python" benchmarks/bench_step.py "${common[@]}" --classes 1000 --batch 16 --steps 2 --json "$out/step_1000.json"
    "$python" benchmarks/bench_memory.py "${common[@]}" --classes 10 100 1000 --json "$out/memory.json"
    "$python" benchmarks/bench_end_to_end.py --threads 2 --epochs 5 --views 2 --json "$out/end_to_end.json"
    "$python" benchmarks/bench_eval.py "${common[@]}" --classes 100 --batch 16 --images 256 --json "$out/eval_100.json"
    "$python" benchmarks/bench_eval.py "${common[@]}" --classes 1000 --batch 16 --images 64 --json "$out/eval_1000.json"
    "$python" benchmarks/bench_field.py "${common[@]}" --classes 100 --rounds 3 --output "$out/field_100.json" \
        --document docs/PERFORMANCE.md
    "$python" benchmarks/bench_field.py "${common[@]}" --classes 10 --rounds 1 --output "$out/field_10.json"
    "$python" benchmarks/bench_step.py "${common[@]}" --classes 10 --batch 16 --steps 3 --json "$out/step_10.json"
    "$python" benchmarks/protocol_hours.py "$out"/field_10*.json "$out"/step_10.json "$out"/step_100.json \
        --document docs/PERFORMANCE.md
    "$python" benchmarks/input_pipeline.py --document docs/PERFORMANCE.md
    "$python" benchmarks/bench_frozen.py --output "$out/frozen.json" --document docs/PERFORMANCE.md
fi
"$python" benchmarks/report.py "$out"
