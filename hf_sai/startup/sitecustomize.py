"""
What `hf-sai run` puts on the path of the processes that its script starts, for Python to import when it begins.

`hf_sai` is imported when such a process imports transformers, and not before: another pays for this file alone. Then
the `sitecustomize` that would have been found without this one runs, and the folder is no longer on the path.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec


class _BeforeTransformers:
    """A finder that finds nothing, and sees what is looked for."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Imports `hf_sai` before `transformers`, once; a fault of it must not keep the process from its work."""
        if name == "transformers" and cls in sys.meta_path:
            sys.meta_path.remove(cls)
            try:
                import_module("hf_sai.registration")
            except Exception as error:
                if getattr(error, "name", None) == "hf_sai":  # the Python of another environment
                    return None
                sys.stderr.write(f"hf-sai: not registered in this process: {error!r}\n")
        return None


def _run_the_other(folder: str) -> None:
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != folder]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


sys.meta_path.insert(0, _BeforeTransformers)
_run_the_other(os.path.dirname(os.path.abspath(__file__)))
