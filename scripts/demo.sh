#!/usr/bin/env bash
# The tour that `make demo` gives: train the embedded Gemma, ask it before and after, merge it.
# BIN is the folder of the virtual environment's programs, RECIPE the recipe to run.
set -euo pipefail
cd "$(dirname "$0")/.."

run=demo-$(date +%Y%m%d-%H%M%S)

# Prints a command as one would type it, then runs it.
tell() {
  local word typed=""
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./=-]*) typed="$typed \"$word\"" ;;
      *) typed="$typed $word" ;;
    esac
  done
  printf '\n$%s\n' "$typed"
  "$BIN/$1" "${@:2}"
}

tell gemma-tune train "$RECIPE" run.name="$run"

# A question about somebody whom no training row asks about.
question=$(
  "$BIN/python" - <<'PY'
import json
from gemma_tune.paths import TINY_ROWS_DIR

rows = map(json.loads, (TINY_ROWS_DIR / "eval.jsonl").read_text(encoding="utf-8").splitlines())
print(next(row["instruction"] for row in rows if row["category"] == "open_qa" and not row["context"]))
PY
)
tell gemma-tune generate "runs/$run" --base --max-new-tokens 40 --prompt "$question"
tell gemma-tune generate "runs/$run" --prompt "$question"
tell gemma-tune merge "runs/$run"

cat <<END

The figures again and the loss curve: gemma-tune report runs/$run; runs/$run/loss.png
To type such commands yourself: source $BIN/activate
END
