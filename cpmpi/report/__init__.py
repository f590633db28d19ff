"""A run as one page that a browser opens without a network, and as pictures.

May import: errors and text, timeline, documents, model, run, topology.
"""
