"""Ranks, their messages, and this process's share of its node.

May import: errors and text, topology.
"""
