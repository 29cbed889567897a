"""What pyproject.toml cannot say: packages are found, and the recipes are one of them, though they lie in configs/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lejepa_scale*"]), "lejepa_scale.recipes"],
    package_dir={"lejepa_scale.recipes": "configs"},
)
