"""Out-of-distribution detection for image classifiers: ELogitNorm, NCI, and the detectors around them."""

__version__ = "0.1.0"
