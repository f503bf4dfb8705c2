#!/usr/bin/env bash
# Three rewards, two seeds, then the comparison: six runs of 60 steps, 4 to 5 seconds each on two cores. Interrupted? Run it again: it goes on where it was.
#     bash examples/sweep.sh            # -> runs/sweep/compare/curves.png, table.md
set -euo pipefail
out=runs/sweep steps=${STEPS:-60}
models=()
for seed in 0 1; do
    for setting in "deg-len|deg len" "deg|deg" "brief|deg len examples/brevity.py:brevity"; do
        name="${setting%%|*}-$seed"
        models+=("$name=$out/$name/model")
        [ -e "$out/$name/model" ] && continue
        python train_grpo.py --rewards ${setting#*|} --seed "$seed" --steps "$steps" --save-every 10 --resume --out "$out/$name"
    done
done
python evaluate.py --models "${models[@]}" --no-table-2 --out "$out/eval"
python -m rr1.compare "$out"/{deg-len,deg,brief}-{0,1} --evaluation "$out/eval" --out "$out/compare"
