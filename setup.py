"""Packages are discovered; callbacks/ and recipes/ stand at the top of the repository and install inside `qatkit`."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["qatkit", "qatkit.*"]), "qatkit.callbacks", "qatkit.recipes"])
