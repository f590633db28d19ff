"""From input files to documents of token ids.

May import: errors and text.
"""
