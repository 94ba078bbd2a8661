"""The one thing pyproject.toml cannot say: the top-level folder ``kernels`` is the package ``ood_fast.kernels``.

Everything else is in pyproject.toml. ``find_packages`` picks up new subpackages of ``ood_fast`` by itself.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ood_fast", "ood_fast.*"]), "ood_fast.kernels"],
    package_dir={"ood_fast.kernels": "kernels"},
)
