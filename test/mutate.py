# SPDX-License-Identifier: Apache-2.0
"""Break central lines one at a time, in a copy of the tree, and say which tests notice; not collected by pytest.

    python test/mutate.py [WORD ...]          only the faults with one of these words in their description

Each fault is looked for in the test file named beside it alone, which keeps the run to some minutes.
Exit status: 0 each fault was noticed, 1 one was not, 2 a line is not there any more or its tests fail anyway.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOW = "deq_flow_ros/"
FAULTS = [
    # what is wrong then, file, line, broken line, test file
    ("flow points the other way", FLOW + "model/correlation.py", "self.volumes, self._grid + flow",
     "self.volumes, self._grid - flow", "model/test_correlation"),
    ("correlation not divided by the root of the channels", FLOW + "model/correlation.py",
     "transpose(1, 2) / channels**0.5", "transpose(1, 2) / channels", "model/test_correlation"),
    ("order of the correlation levels", FLOW + "model/correlation.py", "enumerate(volumes, first)",
     "enumerate(volumes[::-1], first)", "model/test_correlation"),
    ("order of the neighbours in upsampling", FLOW + "model/cells.py", ".reshape(cells, 2, 9)",
     ".reshape(cells, 2, 9).flip(2)", "model/test_formulas"),
    ("flow upsampled in cells instead of pixels", FLOW + "model/cells.py", "F.unfold(FACTOR * flow",
     "F.unfold(flow", "model/test_formulas"),
    ("gates of the GRU exchanged", FLOW + "model/update.py", "sigmoid_().chunk(2, 1)", "sigmoid_().chunk(2, 1)[::-1]",
     "model/test_formulas"),
    ("fixed part of the gates subtracted", FLOW + "model/update.py", "context, weight[:, h:c]",
     "context, -weight[:, h:c]", "model/test_formulas"),
    ("deadline overrun by an iteration", FLOW + "equilibrium/stopping.py",
     "(1 + in_flight) * self.iteration_cost_ns <=", "in_flight * self.iteration_cost_ns <=",
     "equilibrium/test_equilibrium"),
    ("tolerance compared the wrong way", FLOW + "equilibrium/stopping.py", "measured <= self.tolerance",
     "measured >= self.tolerance", "equilibrium/test_equilibrium"),
    ("early corrections weigh more than late ones", FLOW + "equilibrium/gradients.py", "[gamma ** (count - i - 1)",
     "[gamma**i", "equilibrium/test_corrections"),
    ("adjoint solution 1 % too large", FLOW + "equilibrium/gradients.py", "        return solution.state\n",
     "        return tuple(1.01 * part for part in solution.state)\n", "equilibrium/test_gradients"),
    ("corrections weighed alike by the training", "training/objective.py", "losses.append(gamma * weighted_mean",
     "losses.append(weighted_mean", "training/test_objective"),
    ("pixels without ground truth are trained on", "training/objective.py", "clip.valid[:, t] * torch.where",
     "torch.where", "training/test_objective"),
    ("errors counted where there is no ground truth", "training/evaluate.py", '{"all": sample.valid}',
     '{"all": np.ones_like(sample.valid)}', "benchmarks/test_benchmark_metrics"),
    ("hidden pixels counted as visible", FLOW + "imaging/metrics.py", "np.isfinite(error) & mask", "np.isfinite(error)",
     "evaluation/test_measures"),
    ("state carried against the motion", FLOW + "model/cells.py", "state[1] if direction",
     "-state[1] if direction", "model/test_formulas"),
    ("forward and backward flow exchanged", FLOW + "streaming/eager.py",
     '(self.last, self.next) if direction == "forward"', '(self.next, self.last) if direction == "forward"',
     "streaming/test_stream_settings"),
    ("both images of a pair have one stamp", FLOW + "streaming/stream.py", "previous_stamp_ns=last.seen.stamp_ns",
     "previous_stamp_ns=turn.seen.stamp_ns", "streaming/test_stream"),
    ("header of the later image on forward flow", FLOW + "ros/camera.py", "self._input, previous.header",
     "self._input, attempt.frame.message.header", "ros/test_flow_node"),
    ("lost frames subtracted", FLOW + "ros/accounts.py", '["lost"] += lost_before', '["lost"] -= lost_before',
     "ros/test_accounts"),
    ("a frame too many counted as lost", FLOW + "ros/camera_input.py", "number - self._last_number - 1",
     "number - self._last_number", "ros/test_flow_node"),
    ("frames received counted twice", FLOW + "ros/accounts.py", '["received"] += 1', '["received"] += 2',
     "ros/test_accounts"),
    ("velocity multiplied by the time between images", FLOW + "ros/outputs.py",
     "_normalized(camera)(flow) / np.float32(elapsed_s)", "_normalized(camera)(flow) * np.float32(elapsed_s)",
     "ros/test_outputs"),
]  # fmt: skip


def main(words: list[str]) -> int:
    """Run the command; returns its exit status."""
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        if (ROOT.parent / "shared").is_dir():  # reference data of test_parity.py
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build"))
        for what, name, line, broken, tests in FAULTS:
            if words and not any(word in what for word in words):
                continue
            path = tree / name
            right = path.read_text(encoding="utf-8")
            if right.count(line) != 1:
                print(f"{what}: expected {line!r} once in {name}, found it {right.count(line)} times")
                return 2
            path.write_text(right.replace(line, broken), encoding="utf-8")
            noticed = first_failure(tree, f"{tests}.py")
            path.write_text(right, encoding="utf-8")
            if noticed and first_failure(tree, noticed):
                print(f"{what}: {noticed} fails without the fault as well")
                return 2
            missed += noticed is None
            print(f"| {what} | {f'`{noticed}`' if noticed else 'NOT NOTICED'} |", flush=True)
    return 1 if missed else 0


def first_failure(tree: Path, tests: str) -> str | None:
    """The first test that fails, as FILE::TEST below the folder ``test``, of a file or of a test named in that way."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", f"test/{tests}"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}  # with the copy in front of what is installed
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return None
    found = re.search(r"^FAILED test/(\S+?::\w+)", result.stdout, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the tests did not run:\n{result.stdout}\n{result.stderr}")
    return found[1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
