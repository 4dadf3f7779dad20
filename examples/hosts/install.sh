#!/usr/bin/env bash
# Makes the environment of one host: examples/hosts/install.sh llamafactory|msswift|axolotl FOLDER
# The hosts' own packages come without their dependencies: they want CUDA's builds, and much that no run here needs.
set -euo pipefail
host=$1 folder=$2
here=$(cd "$(dirname "$0")" && pwd)
declare -A package=([llamafactory]=llamafactory==0.9.5 [msswift]=ms-swift==4.6.0 [axolotl]=axolotl==0.19.0)
"${PYTHON:-python3}" -m venv "$folder"
pip=("$folder/bin/python" -m pip install --quiet)
"${pip[@]}" torch==2.13.0
"${pip[@]}" -r "$here/$host.txt"
"${pip[@]}" --no-deps "${package[$host]}" -e "$here/../.."
if [ "$host" = llamafactory ]; then # imported for sound only, and its wheels want CUDA
    touch "$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/torchaudio.py"
fi
