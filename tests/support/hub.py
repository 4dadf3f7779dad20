"""What the tests of pushes share; the Hub itself is `hub_server.py`."""

from __future__ import annotations

import shlex


TOKEN = "hf_" + "SecretSecretSecretSecret" + "0123456789"
OTHER_TOKEN = "no-usual-form-of-a-token"
FOREVER = 10**6


def command_in(text):
    """The arguments of the last `hf-sai push` that a text tells to run."""
    line = next(line for line in reversed(text.splitlines()) if "hf-sai push" in line)
    return shlex.split(line[line.index("hf-sai push") :])[1:]
