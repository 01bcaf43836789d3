"""The version of kmerge."""

__version__ = "0.1.0"
