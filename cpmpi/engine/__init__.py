"""One job from start to end.

May import: every other room but jobs.
"""
