"""What of torch's modes would change a step: autocast, and products in a lower precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


def undisturbed(products: bool) -> contextlib.AbstractContextManager[Any]:
    """While it is open, no autocast changes a step, and where it has float32 `products` no lower precision of them."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    changing = [device for device in devices if torch.is_autocast_enabled(device)]
    products = products and not torch.compiler.is_compiling()  # which can't trace these settings
    # The compiler can't break its graph within another context.
    return _undisturbed(changing, products) if changing or products else contextlib.nullcontext()


@contextlib.contextmanager
def _undisturbed(autocasts: list[str], products: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device in autocasts:
            stack.enter_context(torch.autocast(device, enabled=False))
        if products:
            stack.callback(_exact_products())
        yield


def _exact_products() -> Callable[[], None]:
    """Has float32 products computed in float32; returns what makes it as it was."""
    modules: list[Any] = [torch.backends.cuda, torch.backends.mkldnn]
    backends = [each.matmul for each in modules if _has_precision(getattr(each, "matmul", None))]
    if not backends:  # torch before 2.9
        general = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(general)
    before = [each.fp32_precision for each in backends]
    changed = [pair for pair in zip(backends, before, strict=True) if pair[1] != "ieee"]
    for backend, _ in changed:
        backend.fp32_precision = "ieee"

    def undo() -> None:
        for backend, precision in changed:
            backend.fp32_precision = precision

    return undo


def _has_precision(backend: Any) -> bool:
    try:
        return hasattr(backend, "fp32_precision")
    except RuntimeError:
        return False
