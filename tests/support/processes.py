"""Processes that tests start, and what they use."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys


HF_SAI = [sys.executable, "-c", "import sys; from hf_sai.cli import app; sys.exit(app(prog_name='hf-sai'))"]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def call(command, cwd, **env):
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell has put behind
    )


def _here(folder, arguments):
    from hf_sai.cli import app

    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    app(arguments, prog_name="hf-sai")


def forked(processes, folder, *arguments):
    """Exit code and output of `hf-sai ARGUMENTS`, run in a folder by one of the `processes` that have imported all."""
    process = processes.Process(target=_here, args=(folder, arguments))
    process.start()
    process.join(100)
    return process.exitcode, (folder / "output.txt").read_text()


def assert_ended(done):
    """
    Both processes came to their end. Under load gloo's threads (torch 2.13) at times abort a process that is through
    with its script and has left the group; what it wrote before is then what counts.
    """
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr


def peak_allocated(function):
    """The most bytes that a function had allocated at a time on the CPU, beyond what stood before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler recorded no allocation"
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
