"""One of our optimizers in the place of a script's `torch.optim.AdamW`."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
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

from .live import splitting_mode
from .optim.registry import OptimizerRecord, OptionError, get_record, parse_options, record_of, split_routing
from .optim.routing import ADAM
from .script_report import ScriptReport


logger = logging.getLogger(__name__)

# The defaults of torch and of diffusers' scripts.
ADAMW_LEARNING_RATES = (1e-3, 5e-4, 3e-4, 1e-4, 2e-5, 1e-5, 5e-6, 1e-6)
_OPTIMIZER_FLAGS = ("--use_8bit_adam", "--optimizer", "--optimizer_type", "--optim", "--use_prodigy")


@dataclass
class Replacement:
    """
    One of our optimizers in the place of a script's `torch.optim.AdamW`.

    Args:
        record (`OptimizerRecord`): Which one.
        options (`dict`): Typed, for its constructor.
        routing (`dict`): Typed, for the record's `regroup`.
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
                f"that builds its own optimizer; use --optim {record.ordinary}"
            )
        mode = splitting_mode()
        if mode is not None:
            raise OptionError(
                f"{name} in the place of a script's AdamW needs whole tensors, but the launcher has set {mode}, which "
                "splits them over the ranks; use FSDP version 2 or DDP, or leave out hf-sai's --optim"
            )
        options = parse_options(record, parse_optim_args(optim_args))
        if "gsnr" in options:
            raise OptionError(
                "gsnr of another run is matched by the names of the parameters, but a script that builds its own "
                "optimizer gives none; leave gsnr out"
            )
        options, routing = split_routing(record, options)
        if routing and record.regroup is None:
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
            uses=self.record.host_settings,
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
                say(f"{cls.__name__} ran, {steps} steps{where}")
            if self.report.folder is None:
                logger.warning("No report was written: the script gave accelerate no folder (project_dir).")
            return
        if {"-h", "--help"} & set(self.arguments):
            return
        if not self.built:
            end(
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
        say(
            f"{type(optimizer).__name__} in the place of torch.optim.AdamW: {len(params)} tensors "
            f"({sum(param.numel() for param in params) / 1e6:.3g} M elements), lr {_listed(rates)}, "
            f"weight decay {_listed(decays)}"
        )
        if unused:
            self._warn_once("%s does not use what the script sets for AdamW: %s.", name, ", ".join(unused))
        like_adamw = [rate for rate in rates if any(math.isclose(rate, each) for each in ADAMW_LEARNING_RATES)]
        as_adam = self.record.adam_rates or {group.get("normalize") for group in optimizer.param_groups} == {"rms"}
        if like_adamw and not as_adam:
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
        items = [item for group in groups for item in group["params"]]
        params = [item[1] if isinstance(item, tuple) else item for item in items]
        modules = named_modules_of(params)
        tree = next(iter(modules.values())) if len(modules) == 1 else modules
        names = {param: name for name, param in tree.named_parameters()}
        unnamed = [param for param in params if param not in names]
        names |= {param: f"unnamed.{index}" for index, param in enumerate(unnamed)}
        named = [
            {**group, "params": [item if isinstance(item, tuple) else (names[item], item) for item in group["params"]]}
            for group in groups
        ]
        if self.record.regroup is None:
            return named
        routed, lost, summed_up = self.record.regroup(named, modules.values(), **self.routing)
        if lost:
            logger.warning("%s: the modules of %d tensors were not found; routed by shape.", self.record.name, lost)
        say(f"{self.record.name}: {summed_up}")
        return routed


def _listed(values: list[float]) -> str:
    """Each number once."""
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def say(message: str) -> None:
    """A line on the terminal, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"hf-sai: {message}\n")


def end(message: str, code: int) -> NoReturn:
    """Ends the process with a line on the terminal."""
    sys.stderr.write(f"{message}\n")
    raise SystemExit(code)
