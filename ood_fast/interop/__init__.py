"""Detectors of this package in the frameworks of others, in their sign and under their names.

    from ood_fast.interop.pytorch_ood import PytorchOOD    # a pytorch_ood.api.Detector, higher = OOD
    from ood_fast.interop.openood import Postprocessor     # an OpenOOD v1.5 postprocessor, higher = in-distribution
    from ood_fast.interop.training import OODMetrics       # a Lightning callback, or a call for any logger

Each is imported by its full name: only then does it import the framework.
"""
