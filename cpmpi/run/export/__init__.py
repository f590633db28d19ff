"""A run's documents as files of other tools, one module a format; nothing is ever in memory as a whole.

May import: errors and text, timeline, documents, attention, and what is in `cpmpi.run`.
"""
