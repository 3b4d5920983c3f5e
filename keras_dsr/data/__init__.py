"""Data sets by name, split so that a choice never sees the test part.

- `keras_dsr.data.images`: images
"""
