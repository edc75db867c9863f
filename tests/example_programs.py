"""Examples as processes that a test stops."""

import signal
import subprocess
import sys
import time

from helpers import ROOT

EXAMPLES = ROOT / "examples"


def start(command, *arguments):
    # A shell's background job ignores Ctrl-C and so would what it starts; a handler is not inherited.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, *map(str, (*command, *arguments))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=EXAMPLES,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(path, process):
    for _ in range(60_000):
        if path.exists():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    raise AssertionError(f"{path} has not come")
