"""The scripts and the tools of benchmarks/ as from a shell, in this process."""

import contextlib
import io
import runpy
import sys
import warnings

import pytest


def run_program(module, *arguments):
    """python -m MODULE ARGUMENTS"""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules")
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def errors_of(module, *arguments) -> str:
    """What it writes to stderr; it must end with exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit, match=r"^2$"):
        run_program(module, *arguments)
    return errors.getvalue()


def fails(module, *arguments) -> str:
    """The one line with which it ends, exit code 2."""
    line = errors_of(module, *arguments)
    assert line.startswith("error: ") and line.count("\n") == 1
    return line
