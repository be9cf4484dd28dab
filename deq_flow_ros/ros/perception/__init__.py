# SPDX-License-Identifier: Apache-2.0
"""Nodes that subscribe to the flow of ``flow_node``. Their processes import neither PyTorch nor the network."""
