"""Semantic segmentation with error-correcting output codes where labels are scarce."""

__version__ = "0.1.0"
