# SPDX-License-Identifier: Apache-2.0
"""A drive through a 3D scene with exact flow, as a recording to try the project with."""
