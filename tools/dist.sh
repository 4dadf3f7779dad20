#!/usr/bin/env bash
# `make dist`: builds wheel and sdist into dist/, checks their metadata, and installs each into an empty environment
# that borrows nothing but the dependencies of .venv. Publishes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet build twine
rm -rf dist
"$work/tools/bin/python" -m build --outdir dist .
"$work/tools/bin/twine" check --strict dist/*

hosts=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])')
for file in "$PWD"/dist/*.whl "$PWD"/dist/*.tar.gz; do
  echo "== $(basename "$file")"
  environment=$work/$(basename "$file").environment
  "$python" -m venv "$environment"
  "$environment/bin/python" -m pip install --quiet --no-deps "$file"
  # After its own packages, so that ours is the one that was installed here.
  echo "$hosts" > "$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/hosts.pth"
  (
    cd "$work" # not in the clone: its folders would be imported
    "$environment/bin/python" - <<'CHECK'
import importlib.metadata
import importlib.resources
import sys

import hf_sai
import model_cards
import trainer_patches


for module in (hf_sai, model_cards, trainer_patches):
    assert module.__file__.startswith(sys.prefix), module.__file__
    assert (importlib.resources.files(module) / "py.typed").is_file(), module
assert importlib.metadata.version("hf_sai") == hf_sai.__version__
missing = [name for name in hf_sai.__all__ if getattr(hf_sai, name, None) is None]
assert not missing, missing
cards = sorted(each.name for each in importlib.resources.files(model_cards).iterdir() if each.name.endswith(".jinja"))
assert {"sgd_sai.md.jinja", "swan.md.jinja"} <= set(cards), cards
assert (importlib.resources.files(hf_sai) / "report" / "templates" / "report.html.jinja").is_file()
print(f"hf_sai {hf_sai.__version__}: {len(hf_sai.__all__)} public names, {len(cards)} card templates, the page's template")
CHECK
    for command in --help list env; do
      "$environment/bin/hf-sai" "$command" > said.txt
      echo "hf-sai $command: $(wc -l < said.txt) lines"
    done
  )
done
