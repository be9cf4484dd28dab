# SPDX-License-Identifier: Apache-2.0
"""Runs of several processes, and runs that are killed: in the end the same as one that nothing happened to."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import tiny_training as tiny
import torch

from training import train
from training.runtime import Processes


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Why: machines are taken away without a word. SIGKILL in mid-run, resumed: the same losses, the same weights."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    endless = [*tiny.arguments(killed, "schedule.steps=500"), "--checkpoint-every", "0"]
    process = forked.start(train.main, endless, tmp_path / "log")
    deadline = time.monotonic() + 120
    while not (killed / "trapezoid.pt").is_file():
        assert time.monotonic() < deadline and process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    reached = max(tiny.losses(killed))
    assert reached < 500
    for out in (killed, whole):
        assert train.main(tiny.arguments(out, f"schedule.steps={reached + 1}")) == 0
    assert tiny.losses(killed) == tiny.losses(whole)
    ours, theirs = (torch.load(out / "trapezoid.pt", weights_only=True) for out in (killed, whole))
    for part in ("model", "ema"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    """Why: a run on more GPUs must be the same run, faster. By torchrun, as users start it; rank 0 alone writes."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    changes = ["schedule.steps=3", "validation.sets=[{dataset: synthetic, limit: 3}]"]
    assert train.main(tiny.arguments(alone, *changes)) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command += ["--nproc-per-node", "2", "-m", "training.train", *tiny.arguments(together, *changes)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("step 3 of 3") == 1
    assert tiny.losses(together) == pytest.approx(tiny.losses(alone), rel=1e-4)
    measured = [[e["validation"] for e in tiny.log(out) if "validation" in e] for out in (together, alone)]
    assert measured[0][0] == measured[1][0] and measured[0][1] == pytest.approx(measured[1][1], rel=1e-2)
    ours, theirs = (torch.load(out / "trapezoid.pt", weights_only=True) for out in (together, alone))
    # Running means of the gradients. Weights tell less: AdamW makes full steps of gradients that are nothing but noise.
    gradients = [
        torch.cat([entry["exp_avg"].flatten() for entry in state["optimizer"]["state"].values()])
        for state in (ours, theirs)
    ]
    # A rounding error may switch a ReLU for a whole plain area, which is alike in all its pixels: some thousandths.
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()
    assert ours["samples"] == theirs["samples"] == 6


def test_a_batch_that_cannot_be_shared_evenly_is_refused() -> None:
    """Why: means over unequal shares would weigh some samples more than others."""
    shares = [list(Processes(rank, 3).share(range(6, 12))) for rank in range(3)]
    assert shares == [[6, 7], [8, 9], [10, 11]]
    with pytest.raises(ValueError, match=r"data.batch: expected a multiple of the 3 processes, got 4"):
        Processes(0, 3).share(range(4))
