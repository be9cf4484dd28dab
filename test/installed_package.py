# SPDX-License-Identifier: Apache-2.0
"""An installation of the tree in a folder, as pip and colcon make one."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARE = Path("share/deq_flow_ros")


def install(prefix: Path) -> Path:
    """What `setup.py` installs: data files under the prefix, modules in its `modules`."""
    commands = ["build_py", "--build-lib", str(prefix / "modules"), "install_data", "--install-dir", str(prefix)]
    subprocess.run([sys.executable, "-W", "ignore", "setup.py", "--quiet", *commands], cwd=ROOT, check=True, timeout=60)
    return prefix
