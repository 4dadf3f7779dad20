"""
The moments at which a script that is not ours writes its artifacts: a checkpoint of accelerate's, an upload, its end.

Diffusers' training scripts have no callbacks, but they call `Accelerator.save_state`, `Accelerator.end_training` and,
with `--push_to_hub`, `huggingface_hub.upload_folder`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def artifact_moments(
    on_checkpoint: Callable[[Path, Path | None], None],
    on_upload: Callable[[Path], None],
    on_end: Callable[[Path | None], None],
) -> Iterator[None]:
    """
    While it is open, these are called, in the main process only.

    Args:
        on_checkpoint (callable): After `Accelerator.save_state`, with its folder and the accelerator's project folder,
            which is the script's `--output_dir`, or `None` where it has none.
        on_upload (callable): Before `upload_folder` lists its files, with its folder. Under each of the function's
            names, and in the class that a script may make an instance of.
        on_end (callable): Before `Accelerator.end_training`, with the project folder.
    """
    import accelerate
    import huggingface_hub

    accelerator_class = accelerate.Accelerator
    save_state, end_training = accelerator_class.save_state, accelerator_class.end_training

    @functools.wraps(save_state)
    def saved(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder = save_state(self, *args, **kwargs)
        if self.is_main_process:
            on_checkpoint(Path(folder), _project(self))
        return folder

    @functools.wraps(end_training)
    def ended(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_main_process:
            on_end(_project(self))
        return end_training(self, *args, **kwargs)

    def before_upload(upload: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(upload)
        def uploaded(*args: Any, **kwargs: Any) -> Any:
            on_upload(Path(inspect.signature(upload).bind(*args, **kwargs).arguments["folder_path"]))
            return upload(*args, **kwargs)

        return uploaded

    places: list[tuple[Any, str, Callable[..., Any]]] = [
        (accelerator_class, "save_state", saved),
        (accelerator_class, "end_training", ended),
    ]
    for holder in (huggingface_hub, huggingface_hub.hf_api, huggingface_hub.HfApi):
        places.append((holder, "upload_folder", before_upload(holder.upload_folder)))
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in places]
    for holder, name, function in places:
        setattr(holder, name, function)
    try:
        yield
    finally:
        for holder, name, function in before:
            setattr(holder, name, function)


def _project(accelerator: Any) -> Path | None:
    return None if accelerator.project_dir is None else Path(accelerator.project_dir)
