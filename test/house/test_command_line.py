# SPDX-License-Identifier: Apache-2.0
"""What all commands have in common: values are checked where they are read, and an end without a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deq_flow_ros.command_line import CommandLine, exit_status


def line() -> CommandLine:
    made = CommandLine("python -m some.command", "What it does.")
    made.add_number("--frames", 40, "pairs to measure", least=1)
    made.add_number("--bound", [0.05, 0.2], "px", above=0, nargs="+")
    made.add_size(64, 96, "as the camera has it", multiple=8)
    made.add_threads()
    made.add_path("--out", "where")
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "0"], "--frames: expected at least 1, got 0"),
        (["--frames", "many"], "--frames: expected a whole number, at least 1, got 'many'"),
        (["--bound", "1", "0"], "--bound: expected above 0, got 0"),
        (["--threads", "99999"], "--threads: expected at least 1, at most 256, got 99999"),
        (["--bound", "nan"], "--bound: expected a number, above 0, got 'nan'"),
        (["--height", "100"], "--height: expected a multiple of 8, at least 64, got 100"),
    ],
)
def test_a_wrong_value_is_named_with_what_it_may_be(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        line().parse_args(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_wrong_option_is_the_first_thing_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """The usage of a command with many options fills a screen, and what is wrong would stand below it."""
    with pytest.raises(SystemExit):
        line().parse_args(["--freams", "3"])
    said = capsys.readouterr().err.splitlines()
    assert "unrecognized arguments: --freams 3 (did you mean '--frames'?)" in said[0] and "--help" in said[1]
    assert len(said) == 2
    with pytest.raises(SystemExit):
        line().parse_args(["--frame", "3"])
    assert "--frame 3 (did you mean '--frames'?)" in capsys.readouterr().err, "an abbreviation is not guessed at"


def test_values_are_numbers_and_the_help_says_their_defaults() -> None:
    """A default that the help repeats by hand is wrong as soon as one of both is changed."""
    options = line().parse_args(["--frames", "3", "--bound", "1", "2", "--out=~/x"])
    assert options.out == Path.home() / "x", "no shell replaces it behind ="
    assert (options.frames, options.bound, options.height, options.threads) == (3, [1.0, 2.0], 64, None)
    said = " ".join(line().format_help().split())
    assert "pairs to measure (default 40)" in said and "px (default 0.05 0.2)" in said and "(default: theirs)" in said


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FileNotFoundError("no such bag"), 2, "error: no such bag\n"),
        (FileNotFoundError(2, "No such file or directory", "pairs.json"), 2, "error: pairs.json does not exist\n"),
        (FileExistsError(17, "File exists", "out"), 2, "error: out is a file, and a folder is needed\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_an_error_of_the_user_is_one_line(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert exit_status(work) == status and capsys.readouterr().out == said


def test_an_error_of_ours_is_not_hidden() -> None:
    """Only a traceback says where the fault of a program is."""

    def work() -> int:
        raise KeyError("iterations")

    with pytest.raises(KeyError):
        exit_status(work)
    assert exit_status(work, {KeyError: 3}) == 3 and exit_status(lambda: 1) == 1

    def decode() -> int:
        return int(b"\xff".decode())

    assert exit_status(decode) == 2, "a kind of ValueError"
    with pytest.raises(UnicodeDecodeError):
        exit_status(decode, exactly=True)


def test_no_other_module_makes_a_parser() -> None:
    """Checks of values, help and endings that each command has of its own drift apart."""
    root = Path(__file__).parents[2]
    files = [file for folder in ("deq_flow_ros", "training", "benchmarks") for file in (root / folder).rglob("*.py")]
    found = {file.name for file in files if "ArgumentParser" in file.read_text()}
    assert len(files) > 100 and found == {"command_line.py"}


def test_ctrl_c_while_modules_are_loaded_shows_no_traceback() -> None:
    """PyTorch and OpenCV take seconds; whoever has mistyped a command does not wait for them."""
    slow = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
    code = f"from deq_flow_ros import program\nwith program('evaluate_bag'):\n    {slow}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
