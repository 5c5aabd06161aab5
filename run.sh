#!/usr/bin/env bash
# One worker: finds the environment, then becomes run.py, whose exit code and signals are its own.
#
#   srun ./run.sh CONFIG [key.path=value ...]             in an allocation; pararun does this
#   mpirun -np 2 ./run.sh CONFIG                          on one host; over several: -x hostip=<address of rank 0's>
#   hostip=<ip> port=<port> rank=<rank> ./run.sh CONFIG world_size=<n>     by hand, one on every node
#
# SAGE_ENV: the path of the venv or conda environment (default: .venv beside this file).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
environment=${SAGE_ENV:-$here/.venv}
if [ ! -x "$environment/bin/python" ]; then
  echo "run.sh: SAGE_ENV: expected the path of a venv or conda environment, got $environment" \
    "(it has no bin/python; make setup makes .venv)" >&2
  exit 2
fi
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-FATAL}  # no C++ stacks: errors come as exceptions
exec "$environment/bin/python" -u "$here/run.py" "$@"
