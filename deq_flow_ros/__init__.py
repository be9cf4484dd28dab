# SPDX-License-Identifier: Apache-2.0
"""Dense optical flow for camera streams by deep equilibrium models (Bai, Geng, Savani, Kolter, CVPR 2022)."""
