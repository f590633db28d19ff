"""The run folder: what a job leaves on disk, and reading it back.

May import: errors and text, timeline, documents, attention.
"""
