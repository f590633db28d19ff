"""What a job will take: time, memory and disk, priced from a described machine.

May import: errors and text, timeline, comm, attention, model, run, kernels, topology.
"""
