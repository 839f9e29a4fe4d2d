#!/bin/sh
# Every run of the pool2000 comparison, one after the other over one cache. A run that is done is
# skipped, and one that was killed goes on from its shards: start this again whenever it ended.
#   INFLUENCE_DATA=/path/to/data benchmarks/pool2000/run.sh [NAME...]     (no NAME: all of them)
# INFLUENCE: the command (default .venv/bin/influence). SELECT_FLAGS: more flags for `select`.
set -eu
cd "$(dirname "$0")/../.."
: "${INFLUENCE_DATA:?set it to the folder with candidates/, targets/ and datainf/}"
INFLUENCE=${INFLUENCE:-.venv/bin/influence}
PYTHON=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1

GSM8K="gsm8k: {path: $INFLUENCE_DATA/targets/gsm8k-dev.jsonl, limit: 64, per: group}"
BBH="bbh: {path: $INFLUENCE_DATA/targets/bbh-dev.jsonl, group_by: task}"
MATH="math: {path: $INFLUENCE_DATA/datainf/math_without_reason_test.jsonl, per: group}"
ALL="both gsm8k bbh three exact-both exact-gsm8k exact-bbh rds-both rds-gsm8k rds-bbh random"

counts() { # stages of a run: shards that were there already, shards computed, seconds
    "$PYTHON" - "$1/manifest.json" <<'END'
import json, sys
for name, stage in json.load(open(sys.argv[1]))["stages"].items():
    found = {key: stage[key] for key in ("shards", "reused", "computed")}
    print(f"  {name}: {found}, {stage['seconds']:.0f} s, model {stage['model_seconds']:.0f} s")
END
}

select_run() { # NAME TARGETS [--set KEY=VALUE]...
    name=$1 targets=$2
    shift 2
    run=runs/pool2000/$name
    if grep -qs '"state": "done"' "$run/manifest.json"; then
        echo "$name: done already"
        return
    fi
    echo "$name: starts $(date -u +%H:%M:%S)"
    # shellcheck disable=SC2086
    "$INFLUENCE" select benchmarks/pool2000/base.yaml ${SELECT_FLAGS:-} \
        --set "run=$run" --set "targets={$targets}" \
        --set "data.candidates=[$INFLUENCE_DATA/candidates/part-000.parquet]" "$@"
    echo "$name: ends $(date -u +%H:%M:%S)"
    counts "$run"
}

for name in ${@:-$ALL}; do
    case $name in
        both | *-both) targets="$GSM8K, $BBH" ;;
        gsm8k | *-gsm8k) targets="$GSM8K" ;;
        bbh | *-bbh) targets="$BBH" ;;
        three) targets="$GSM8K, $BBH, $MATH" ;;
        random) targets="$GSM8K, $BBH" ;;
        *) echo "unknown run $name; expected some of: $ALL" >&2; exit 2 ;;
    esac
    case $name in
        exact-*) select_run "$name" "$targets" --set method=exact --set gradients.projection=exact ;;
        rds-*) select_run "$name" "$targets" --set method=rds ;;
        random) select_run "$name" "$targets" --set method=random ;;
        *) select_run "$name" "$targets" ;;
    esac
done
