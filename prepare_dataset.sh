#!/usr/bin/env bash
# Prepare a data set once: ./prepare_dataset.sh NAME [--from PATH] [--data DIR]     (--help explains)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${SAGE_ENV:-$here/.venv}/bin/python
[ -x "$python" ] || python=python3   # a conda environment
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$python" -m tasks.data.prepare "$@"
