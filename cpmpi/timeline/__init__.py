"""Who did what when: intervals, their files and pictures.

May import: errors and text, topology (for drawing).
"""
