"""`hf-sai run`: an unmodified script, with our optimizers among its choices or in the place of its AdamW."""

from __future__ import annotations

import importlib.util
import io
import os
import pkgutil
import runpy
import sys
import sysconfig
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import CodeType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Protocol

import typer

from ..files import is_switched_off


if TYPE_CHECKING:
    from ..stand_in import Replacement


HELP = """
Runs a training script, unmodified.

A script with TrainingArguments (transformers, TRL) takes the optimizer among its own options, after its path:

    hf-sai run train.py --optim sgd_sai --optim_args "momentum=0.9"

    hf-sai run -m trl.scripts.sft --optim swan ...

A script that builds torch.optim.AdamW itself (diffusers) gets another in its place, named before its path:

    hf-sai run --optim sgd_sai --optim_args "momentum=0.9" train_dreambooth.py ...

With several processes:

    accelerate launch -m hf_sai.run train.py ...

    torchrun --nproc_per_node 2 -m hf_sai.run train.py ...

Processes that the script starts itself know the optimizers too (HF_SAI_CHILDREN=0: they do not):

    hf-sai run llamafactory-cli train config.yaml
"""


class StandIn(Protocol):
    """What takes the place of something in a script while that runs."""

    def installed(self) -> AbstractContextManager[None]:
        """While it is open, it is there."""

    def check_used(self) -> None:
        """Ends the process where the script has ended well without it."""


@dataclass(frozen=True)
class Script:
    """
    What is to be run.

    Args:
        target (`str`): Path of a script, or name of a module.
        arguments (`list[str]`): The script's own.
        is_module (`bool`): Whether `target` is a module's name.
        replacement (`StandIn`, *optional*): What stands in for its AdamW, or for its training.
    """

    target: str
    arguments: list[str]
    is_module: bool
    replacement: StandIn | None = None


class ScriptRequest(BaseException):
    """
    Takes a script out of the command line's frames.

    Inside them `Ctrl-C`, exceptions and click's current context would be the command line's and not the script's. No
    `Exception`, because these the command line reports by itself.
    """

    def __init__(self, script: Script) -> None:
        super().__init__(script.target)
        self.script = script


def run(
    command: Annotated[
        list[str], typer.Argument(metavar="SCRIPT", help="The script's path, and all that belongs to it")
    ],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as in python -m")] = False,
    optim: Annotated[str | None, typer.Option(help="Stands in for the script's torch.optim.AdamW")] = None,
    optim_args: Annotated[
        str | None, typer.Option("--optim_args", "--optim-args", help="Its options: name=value,name=value")
    ] = None,
) -> None:
    target, *arguments = command
    try:
        replacement = _replacement(optim, optim_args, arguments)
    except ValueError as error:
        typer.echo(f"hf-sai: {error}", err=True)
        raise typer.Exit(2) from None
    raise ScriptRequest(Script(target, arguments, module, replacement))


def _replacement(optim: str | None, optim_args: str | None, arguments: list[str]) -> Replacement | None:
    """What stands in for the script's AdamW; without it a script starts at once, for torch is not imported here."""
    if optim is None:
        if optim_args is not None:
            raise ValueError(
                f"optim_args before the script need an optimizer, but {optim_args!r} stands alone; add --optim, or "
                "move it behind the script's path if it is the script's own"
            )
        return None
    from ..stand_in import Replacement

    return Replacement.of(optim, optim_args, arguments)


def launch(script: Script) -> None:
    """Runs a script as if Python had been started with it; what it raises, goes on."""
    sys.excepthook = _excepthook
    _reach_children()
    if script.replacement is None:
        _execute(script)
        return
    with script.replacement.installed():
        try:
            _execute(script)
        except SystemExit as ending:
            if ending.code not in (None, 0):
                raise
            script.replacement.check_used()
            raise
        script.replacement.check_used()


def _reach_children() -> None:
    """
    Has the Pythons that the script starts (torchrun, a host's own command) know our names when they import
    transformers; `HF_SAI_CHILDREN=0` leaves them alone, and so do the options `-I`, `-E` and `-S` of theirs.
    """
    folder = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "startup")
    path = os.environ.get("PYTHONPATH")
    before = [entry for entry in path.split(os.pathsep) if entry != folder] if path else []
    if not is_switched_off("HF_SAI_CHILDREN"):
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *before])


def _execute(script: Script) -> None:
    """
    Not by `runpy` where it is one file: that takes `__main__` away when the file has run, before threads that go on
    and functions that are registered with `atexit` look for it. It gives `sys.argv[0]` and `__file__` of a script the
    same text, where Python leaves the one as typed and makes the other absolute.
    """
    target = script.target if script.is_module else _command_of_this_python(script.target)
    sys.argv[:] = [target, *script.arguments]
    if script.is_module:
        _set_path(os.getcwd())
        _execute_module(target)
    elif pkgutil.get_importer(target) is not None:  # a folder or an archive with a __main__.py
        _set_path(target)
        runpy.run_path(target, run_name="__main__")
    else:
        _set_path(os.path.dirname(os.path.realpath(target)))
        _execute_file(os.path.abspath(target))


def _command_of_this_python(target: str) -> str:
    """A command that a package brought, as `llamafactory-cli`, where there is nothing of that name to run here."""
    found = os.path.join(sysconfig.get_path("scripts"), target)
    here = os.path.isfile(target) or os.path.isfile(os.path.join(target, "__main__.py"))
    return found if os.path.isfile(found) and not here else target


def _set_path(folder: str) -> None:
    """Puts first where Python would look first; it put the launcher's own folder there."""
    if not (getattr(sys.flags, "safe_path", False) or sys.flags.isolated):
        sys.path[0] = folder


def _execute_module(name: str) -> None:
    """Ends as `python -m` does where there is no such module."""
    spec = code = None
    try:
        spec = importlib.util.find_spec(name)
        reason = f"No module named {name}"
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            reason = f"No module named {name}.__main__; {name!r} is a package and cannot be directly executed"
        if spec is not None:
            code = getattr(spec.loader, "get_code", lambda of: None)(spec.name)
            reason = f"No code object available for {name}"
    except (ImportError, ValueError) as error:
        reason = f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})"
    if spec is None or code is None:
        _end(f"{sys.executable}: {reason}", 1)
    sys.argv[0] = str(spec.origin)
    _execute_code(
        code,
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )


def _end(message: str, code: int) -> NoReturn:
    """As Python ends where it can't start a program."""
    sys.stderr.write(f"{message}\n")
    raise SystemExit(code)


def _execute_file(path: str) -> None:
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        _end(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}", 2)
    _execute_code(compile(source, path, "exec", dont_inherit=True), __file__=path)


def _execute_code(code: CodeType, **fields: Any) -> None:
    main = ModuleType("__main__")
    vars(main).update(fields)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    sys.__excepthook__(kind, error.with_traceback(without_launcher(traceback)), None)


def without_launcher(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback from the script's first frame on; whole, where the script had not begun."""
    frame = traceback
    while frame is not None and frame.tb_frame.f_code is not _execute.__code__:
        frame = frame.tb_next
    if frame is None:
        return traceback
    while frame is not None and frame.tb_frame.f_globals.get("__name__") in (__name__, "runpy"):
        frame = frame.tb_next
    return frame
