#!/usr/bin/env bash
# Three rewards, two seeds, then the comparison: six runs of 60 steps, the two seeds of a reward side by side, each with half of the cores.
# Interrupted? Run it again: it goes on where it was.
#     bash examples/sweep.sh            # -> runs/sweep/compare/curves.png, runs/sweep/eval/report.txt
set -euo pipefail
out=runs/sweep steps=${STEPS:-60} cores=$(getconf _NPROCESSORS_ONLN)
models=()
mkdir -p "$out"
for setting in "deg-len|deg len" "deg|deg" "brief|deg len examples/brevity.py:brevity"; do
    running=()
    for seed in 0 1; do
        name="${setting%%|*}-$seed"
        models+=("$name=$out/$name/model")
        [ -e "$out/$name/model" ] && continue
        echo "$name: see $out/$name.log"
        OMP_NUM_THREADS=$(((cores + 1) / 2)) python train_grpo.py --rewards ${setting#*|} --seed "$seed" --steps "$steps" --save-every 10 --eval-every 10 \
            --resume --out "$out/$name" >> "$out/$name.log" 2>&1 &
        running+=($!)
    done
    for process in ${running[@]+"${running[@]}"}; do
        wait "$process" || { echo "a run failed; the end of its log:"; tail -n 5 "$out/${setting%%|*}"-?.log; exit 1; }
    done
done
python evaluate.py --models "${models[@]}" --no-table-2 --out "$out/eval"
python -m rr1.evaluation.compare "$out"/{deg-len,deg,brief}-{0,1} --out "$out/compare"
