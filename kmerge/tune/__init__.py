"""Training of merged models: healing by their sources, and with labels per head."""

from kmerge.tune.result import Tuning
from kmerge.tune.settings import Settings, check_settings
from kmerge.tune.training import Subject, tune

__all__ = ["Settings", "Subject", "Tuning", "check_settings", "tune"]
