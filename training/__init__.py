# SPDX-License-Identifier: Apache-2.0
"""Training, evaluation and export of flow models: docs/training.md."""

import time

STARTED = time.monotonic()
"""When this process began: to import PyTorch, which comes next, takes seconds that count in a timed run."""
