"""A checkpoint's own code, made to run layer by layer.

May import: errors and text, comm, documents, attention, kernels.
"""
