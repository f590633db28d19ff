"""Attention across ranks: who holds which tokens, schedules as data, and their execution.

May import: errors and text, comm, timeline, kernels.
"""
