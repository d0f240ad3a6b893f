"""The tools of benchmarks/ as from a shell, in this process."""

import contextlib
import io
import runpy
import sys
import warnings

import pytest


def run_tool(name, *arguments):
    """python -m benchmarks.NAME ARGUMENTS"""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules")
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


def fails(name, *arguments) -> str:
    """The one line with which it ends, exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit, match=r"^2$"):
        run_tool(name, *arguments)
    line = errors.getvalue()
    assert line.startswith("error: ") and line.count("\n") == 1
    return line
