"""The face of a report: the data with its files, its media, its comparison and its way to the Hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_whole
from .compare import Comparison
from .data import ReportData
from .rows import split_name as split_name
from .schema import ReportError, read_text


if TYPE_CHECKING:  # a file is read and shown without torch and without the Hub's client
    from huggingface_hub import CommitInfo

REPORT_JSON = "gsnr_report.json"
REPORT_PNG = "gsnr_report.png"
HISTORY_PNG = "gsnr_history.png"


@dataclasses.dataclass(frozen=True)
class GSNRReport(ReportData):
    """
    What SGD-SaI measured in a run, or how SWAN routed it: [`ReportData`], which has the fields and what is computed of
    them, with its text, page and picture, its files and its way to the Hub.
    """

    def to_text(self) -> str:
        """A plain table by kind of tensor, for a terminal of 80 columns."""
        from .terminal import plain, report_view

        return plain(report_view(self))

    def to_markdown(self) -> str:
        """Facts, and a table by kind of tensor and by layer, or of SWAN's routes."""
        from .markdown import report_markdown

        return report_markdown(self)

    def to_html(self) -> str:
        """A page that needs no network: facts, pictures with details, and a table of all tensors to sort."""
        from .html import report_html

        return report_html(self)

    def plot(self) -> Any:
        """
        The picture as a `matplotlib.figure.Figure`, which a notebook shows and `savefig` writes.

        Raises:
            `ImportError`: matplotlib is not installed.
        """
        from .plots import report_figure

        return report_figure(self)

    def diff(self, other: GSNRReport) -> ReportDiff:
        """
        Compares with the report of another run, tensor by tensor.

        Args:
            other (`GSNRReport`): Of the run whose scales are divided by those of this one.

        Raises:
            `ReportError`: One of them has no scales, as with SWAN.
        """
        return ReportDiff.of(self, other)

    def save(self, directory: str | os.PathLike[str], picture: bool = True) -> Path:
        """
        Writes `gsnr_report.json`, and where matplotlib is installed `gsnr_report.png` (of g-SNR tracked over time
        `gsnr_history.png` too); each whole or not at all. A `gsnr_history.png` of an earlier run is removed.

        Args:
            directory (`str` or path): Made where it is missing.
            picture (`bool`, *optional*, defaults to `True`): Whether to draw.

        Returns:
            `pathlib.Path`: The JSON file.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / REPORT_JSON
        write_whole(path, self.to_json().encode("utf-8"))
        if picture and importlib.util.find_spec("matplotlib") is not None:
            from .plots import history_png, report_png

            write_whole(folder / REPORT_PNG, report_png(self))
            if self.drift():
                write_whole(folder / HISTORY_PNG, history_png(self))
        if not self.drift():
            (folder / HISTORY_PNG).unlink(missing_ok=True)
        return path

    @classmethod
    def from_pretrained(
        cls, repo_id_or_path: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None
    ) -> GSNRReport:
        """
        The report of a run: a file or folder here, else a repository of the Hub.

        Args:
            repo_id_or_path (`str` or path): Such as `"user/repo"`.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*): As in `huggingface_hub`; defaults to the one that is logged in.

        Raises:
            `ReportError`: There is no report, or it can't be read.
        """
        if Path(repo_id_or_path).exists():
            return cls.load(repo_id_or_path)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        try:
            file = hf_hub_download(str(repo_id_or_path), REPORT_JSON, revision=revision, token=token)
        except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())  # whole: the advice on private and gated ones comes last
            raise ReportError(
                f"a g-SNR report must be a file, a folder or a Hub repository with {REPORT_JSON}, but "
                f"{repo_id_or_path!s} gave {type(error).__name__}: {reason}"
            ) from None
        return cls.load(file)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
        commit_message: str = "g-SNR report",
    ) -> CommitInfo:
        """
        Uploads the report and its picture in one commit; [`hf_sai.hub.push.push_folder`] takes model and card along.

        Args:
            repo_id (`str`): Such as `"user/repo"`; without a user it is the token's.
            private (`bool`, *optional*): Visibility where the repository has to be made; else it keeps its own.
            revision (`str`, *optional*): Branch, made where it is missing; defaults to `main`.
            create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
            token (`str` or `bool`, *optional*): As in `huggingface_hub`; defaults to the one that is logged in.
            commit_message (`str`, *optional*): Of the commit.

        Returns:
            `huggingface_hub.CommitInfo`: Of the commit.

        Raises:
            `UploadError`: It did not work out.
        """
        from ..upload import Destination, upload

        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            files = {path.name: path for path in Path(folder).iterdir()}
            destination = Destination(repo_id, private, revision, create_pr, token)
            return upload(files, destination, commit_message)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GSNRReport:
        """
        Reads a report.

        Args:
            path (`str` or path): The JSON file, or the folder that holds it.

        Raises:
            `ReportError`: It can't be read.
        """
        file = Path(path)
        file = file / REPORT_JSON if file.is_dir() else file
        return cls.from_json(read_text(file))


@dataclasses.dataclass(frozen=True)
class ReportDiff(Comparison):
    """Two runs compared; `GSNRReport.diff` makes it. [`Comparison`] has the fields."""

    def to_text(self) -> str:
        """A plain table for a terminal of 80 columns, furthest apart first."""
        from .terminal import diff_view, plain

        return plain(diff_view(self))

    def plot(self, ratio: float | None = None) -> Any:
        """
        The scatter plot as a `matplotlib.figure.Figure`.

        Args:
            ratio (`float`, *optional*): Tensors further apart than this are red.

        Raises:
            `ImportError`: matplotlib is not installed.
        """
        from .plots import diff_figure

        return diff_figure(self, ratio)
