#!/usr/bin/env bash
# Prepare a data set once: ./prepare_dataset.sh NAME [--from ARCHIVE] [--data DIR]     (--help explains)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" exec "$here/.venv/bin/python" -m tasks.data.prepare "$@"
