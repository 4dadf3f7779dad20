"""`hf-sai run`: an unmodified script, with our optimizers among its choices or in the place of its AdamW."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import pkgutil
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, ModuleType, TracebackType
from typing import Annotated, Any, NoReturn

import torch
import typer
from torch.nn import ModuleDict, ModuleList
from torch.optim.optimizer import Optimizer

from trainer_patches import parse_optim_args
from trainer_patches.script_artifacts import artifact_moments
from trainer_patches.script_optimizer import (
    Group,
    guarded_steps,
    named_modules_of,
    replaced_adamw,
    stand_in_for_adamw,
)

from ..integration import splitting_mode
from ..optim import route_parameters
from ..optim.registry import OptimizerRecord, OptionError, get_record, parse_options, record_of, split_routing
from ..optim.routing import ADAM, route_by_shape, summary
from .script_report import ScriptReport


logger = logging.getLogger(__name__)

# The defaults of torch and of diffusers' scripts.
ADAMW_LEARNING_RATES = (1e-3, 5e-4, 3e-4, 1e-4, 2e-5, 1e-5, 5e-6, 1e-6)
_OPTIMIZER_FLAGS = ("--use_8bit_adam", "--optimizer", "--optimizer_type", "--optim", "--use_prodigy")

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
"""


@dataclass(frozen=True)
class Script:
    """
    What is to be run.

    Args:
        target (`str`): Path of a script, or name of a module.
        arguments (`list[str]`): The script's own.
        is_module (`bool`): Whether `target` is a module's name.
        replacement (`Replacement`, *optional*): What stands in for its AdamW.
    """

    target: str
    arguments: list[str]
    is_module: bool
    replacement: Replacement | None = None


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
        if optim is None and optim_args is not None:
            raise OptionError(
                f"optim_args before the script need an optimizer, but {optim_args!r} stands alone; add --optim, or "
                "move it behind the script's path if it is the script's own"
            )
        replacement = None if optim is None else Replacement.of(optim, optim_args, arguments)
    except ValueError as error:
        typer.echo(f"hf-sai: {error}", err=True)
        raise typer.Exit(2) from None
    raise ScriptRequest(Script(target, arguments, module, replacement))


def launch(script: Script) -> None:
    """Runs a script as if Python had been started with it; what it raises, goes on."""
    sys.excepthook = _excepthook
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


def _execute(script: Script) -> None:
    """
    Not by `runpy` where it is one file: that takes `__main__` away when the file has run, before threads that go on
    and functions that are registered with `atexit` look for it. It gives `sys.argv[0]` and `__file__` of a script the
    same text, where Python leaves the one as typed and makes the other absolute.
    """
    sys.argv[:] = [script.target, *script.arguments]
    if script.is_module:
        _set_path(os.getcwd())
        _execute_module(script.target)
    elif pkgutil.get_importer(script.target) is not None:  # a folder or an archive with a __main__.py
        _set_path(script.target)
        runpy.run_path(script.target, run_name="__main__")
    else:
        _set_path(os.path.dirname(os.path.realpath(script.target)))
        _execute_file(os.path.abspath(script.target))


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
        _exit(f"{sys.executable}: {reason}", 1)
    sys.argv[0] = str(spec.origin)
    _execute_code(
        code,
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )


def _execute_file(path: str) -> None:
    try:
        with io.open_code(path) as file:
            source = file.read()
    except OSError as error:
        _exit(f"{sys.executable}: can't open file {path!r}: [Errno {error.errno}] {error.strerror}", 2)
    _execute_code(compile(source, path, "exec", dont_inherit=True), __file__=path)


def _execute_code(code: CodeType, **fields: Any) -> None:
    main = ModuleType("__main__")
    vars(main).update(fields)
    sys.modules["__main__"] = main
    exec(code, vars(main))


def _exit(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise SystemExit(code)


def _say(message: str) -> None:
    """A line on the terminal, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"hf-sai: {message}", err=True)


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


@dataclass
class Replacement:
    """
    One of our optimizers in the place of a script's `torch.optim.AdamW`.

    Args:
        record (`OptimizerRecord`): Which one.
        options (`dict`): Typed, for its constructor.
        routing (`dict`): Typed, for [`hf_sai.optim.route_parameters`].
        arguments (`list[str]`): The script's, for the errors to name the option that has to go.
    """

    record: OptimizerRecord
    options: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    built: int = 0
    stepped: dict[type[Optimizer], int] = field(default_factory=dict)
    report: ScriptReport = field(default_factory=lambda: ScriptReport(int(os.environ.get("WORLD_SIZE", "1"))))
    _said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, name: str, optim_args: str | None, arguments: list[str]) -> Replacement:
        """
        From what was typed; a value that is out of range is an error here, before the script loads its model.

        Raises:
            `ValueError`: The name, an option or a value is not known, or can't work in a script like this.
        """
        record = get_record(name)
        if record.layerwise:
            raise OptionError(
                f"{name} updates inside the backward pass and allows no clipping, which can't be seen in a script "
                f"that builds its own optimizer; use --optim {name.removesuffix('_layerwise')}"
            )
        mode = splitting_mode()
        if mode is not None:
            raise OptionError(
                f"{name} needs whole tensors, but the launcher has set {mode}, which splits them over the ranks; use "
                "FSDP version 2 or DDP, or leave out hf-sai's --optim"
            )
        options = parse_options(record, parse_optim_args(optim_args))
        if "gsnr" in options:
            raise OptionError(
                "gsnr of another run is matched by the names of the parameters, but a script that builds its own "
                "optimizer gives none; leave gsnr out"
            )
        options, routing = split_routing(record, options)
        if routing and not record.routed:
            raise OptionError(
                f"{', '.join(routing)} of {name} needs the model, but a script that builds its own optimizer gives "
                "tensors only; leave it out, or build the optimizer with hf_sai.create_optimizer"
            )
        record.cls([torch.nn.Parameter(torch.zeros(2, 2))], **options)
        return cls(record, options, routing, arguments)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While it is open, AdamW is ours and no optimizer of others can step."""
        stand_in = stand_in_for_adamw(
            self.record.cls,
            self.options,
            uses=("betas", "eps") if self.record.routed else (),
            prepare=self._prepared,
            on_build=self._on_build,
        )
        accepts = lambda optimizer: record_of(optimizer) is not None  # noqa: E731
        report = self.report
        with (
            replaced_adamw(stand_in),
            guarded_steps(accepts, self._refusal, report.read) as self.stepped,
            artifact_moments(report.on_checkpoint, report.write, report.write),
        ):
            yield

    def check_used(self) -> None:
        """
        Says so where the script has ended well without any of our optimizers.

        Raises:
            `SystemExit`: With 1: none was built.
        """
        name = self.record.name
        if self.stepped:
            where = "" if self.report.folder is None else f"; report in {self.report.folder}"
            for cls, steps in self.stepped.items():
                _say(f"{cls.__name__} ran, {steps} steps{where}")
            if self.report.folder is None:
                logger.warning("No report was written: the script gave accelerate no folder (project_dir).")
            return
        if {"-h", "--help"} & set(self.arguments):
            return
        if not self.built:
            _exit(
                f"hf-sai: --optim {name} stands in for the script's torch.optim.AdamW, but the script built none and "
                f"stepped none of ours, so it did not train with {name}; {self._remedy()}",
                1,
            )
        logger.warning(
            "%s was built but the script never stepped it; where it did train, another library (DeepSpeed with "
            "offload does) has put its own optimizer in its place.",
            name,
        )

    def _refusal(self, optimizer: Optimizer) -> str:
        live = type(optimizer)
        return (
            f"hf-sai run --optim {self.record.name} must be the optimizer that trains, but the script steps "
            f"{live.__module__}.{live.__qualname__}; {self._remedy()}"
        )

    def _remedy(self) -> str:
        flags = [
            flag for flag in _OPTIMIZER_FLAGS if any(a == flag or a.startswith(f"{flag}=") for a in self.arguments)
        ]
        if flags:
            return f"remove {' and '.join(flags)} from the script's options"
        return (
            "choose torch's AdamW through the script's options (such as --optimizer adamw), or leave out hf-sai's "
            "--optim if the script takes the optimizer's name itself"
        )

    def _on_build(self, optimizer: Optimizer, unused: list[str]) -> None:
        self.built += 1
        name = self.record.name
        routes = {route for group in optimizer.param_groups for route in group.get("routes", ())}
        if routes == {ADAM}:  # textual inversion trains an embedding alone
            self._warn_once("%s whitens nothing here: all tensors of the script's optimizer go to Adam.", name)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        decays = [float(group["weight_decay"]) for group in optimizer.param_groups]
        params = [param for group in optimizer.param_groups for param in group["params"]]
        _say(
            f"{type(optimizer).__name__} in the place of torch.optim.AdamW: {len(params)} tensors "
            f"({sum(param.numel() for param in params) / 1e6:.3g} M elements), lr {_listed(rates)}, "
            f"weight decay {_listed(decays)}"
        )
        if unused:
            self._warn_once("%s does not use what the script sets for AdamW: %s.", name, ", ".join(unused))
        like_adamw = [rate for rate in rates if any(math.isclose(rate, each) for each in ADAMW_LEARNING_RATES)]
        if like_adamw and not self.record.routed:
            hint = self.record.learning_rate_hint
            self._warn_once("lr=%g is a usual one for AdamW and small for %s: %s.", like_adamw[0], name, hint)

    def _warn_once(self, text: str, *values: Any) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text, *values)

    def _prepared(self, groups: list[Group]) -> list[Group]:
        """
        The groups with a name for each parameter and, where the optimizer needs it, route and reason: a script hands
        on bare tensors, so both are taken from the modules that are found to hold them.
        """
        plain = [[item[1] if isinstance(item, tuple) else item for item in group["params"]] for group in groups]
        params = [param for group in plain for param in group]
        modules = named_modules_of(params)
        tree = next(iter(modules.values())) if len(modules) == 1 else modules
        names = {param: name for name, param in tree.named_parameters()}
        lost = [param for param in params if param not in names]
        names |= {param: f"unnamed.{index}" for index, param in enumerate(lost)}
        named = [
            {**group, "params": [item if isinstance(item, tuple) else (names[item], item) for item in group["params"]]}
            for group in groups
        ]
        return self._with_routes(named, plain, modules) if self.record.routed else named

    def _with_routes(self, groups: list[Group], plain: list[list[torch.Tensor]], modules: ModuleDict) -> list[Group]:
        params = [param for group in plain for param in group]
        known: dict[torch.Tensor, tuple[str, str]] = {}
        if (
            modules
        ):  # with a matrix beside them: whether there is one is asked of the whole optimizer, when it is built
            rows = route_parameters(ModuleList([*modules.values(), torch.nn.Linear(2, 2)]), **self.routing)
            known = {row.param: (row.route, row.reason) for row in rows}
        lost = sum(param not in known and param.requires_grad for param in params)
        if lost:
            logger.warning("%s: the modules of %d tensors were not found; routed by shape.", self.record.name, lost)
        found = [[known.get(param) or route_by_shape(param.shape) for param in group] for group in plain]
        counted = [(*row, param.numel()) for row, param in zip((r for g in found for r in g), params, strict=True)]
        _say(f"{self.record.name}: {summary(counted)}")
        return [
            {**group, "routes": [route for route, _ in rows], "reasons": [reason for _, reason in rows]}
            for group, rows in zip(groups, found, strict=True)
        ]


def _listed(values: list[float]) -> str:
    """Each number once."""
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))
