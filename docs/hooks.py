"""What the documentation takes from the code: options of the optimizers, pictures of the benchmarks, references."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

import hf_sai
from hf_sai.optim.registry import get_record


RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
_OPTIONS = re.compile(r"^<!-- options: (\w+) -->$", re.MULTILINE)
_REFERENCE = re.compile(r"\[`~?(?:hf_sai\.)?([\w.]+)`\](?!\[)")
_TYPE = re.compile(r"^( +\*{0,2}\w+(?:, \w+)*) \(.*\):", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Puts the benchmarks' pictures where pages can show them, as `results/<name>.png`."""
    for picture in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Writes a table of an optimizer's options where a page asks for one."""
    return _OPTIONS.sub(lambda found: options_table(found[1]), markdown)


def options_table(name: str) -> str:
    """Options of an optimizer as a Markdown table, from its record."""
    record = get_record(name)
    rows = [f"| `{o.name}` | `{record.default(o.name)}` | {o.kind} | {o.help} |" for o in record.options]
    return "\n".join(["| option | default | value | meaning |", "| --- | --- | --- | --- |", *rows])


class References(griffe.Extension):
    """
    Makes links of the docstrings' [`name`], where it is one of the public names, and leaves types and defaults to the
    signature, which has them too.
    """

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _TYPE.sub(r"\1:", _REFERENCE.sub(_link, obj.docstring.value))


def _link(found: re.Match[str]) -> str:
    name = found[1]
    return f"[`{name}`][hf_sai.{name}]" if name.split(".")[0] in hf_sai.__all__ else f"`{name}`"
