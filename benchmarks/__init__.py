# SPDX-License-Identifier: Apache-2.0
"""Every figure that the documentation quotes, one command each."""
