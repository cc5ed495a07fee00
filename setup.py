"""Lists the packages to install; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# The configs are at the top level, as in every Detectron2 project, and are installed inside the package.
CONFIGS = Path(__file__).parent / "configs"
FOLDERS = [CONFIGS, *sorted(folder for folder in CONFIGS.rglob("*") if folder.is_dir())]
CONFIG_PACKAGES = [".".join(("kmax_d2", "configs", *folder.relative_to(CONFIGS).parts)) for folder in FOLDERS]

setup(
    packages=find_packages(include=["kmax_d2", "kmax_d2.*"]) + CONFIG_PACKAGES,
    package_dir={"kmax_d2.configs": "configs"},
    package_data={package: ["*.yaml"] for package in CONFIG_PACKAGES} | {"kmax_d2": ["assets/*"]},
)
