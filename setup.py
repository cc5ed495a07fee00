"""Install with ``pip install -e .`` in an environment that has detectron2."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CONFIG_PACKAGES = ["kmax_d2.configs"] + [
    "kmax_d2.configs." + ".".join(folder.relative_to(ROOT / "configs").parts)
    for folder in sorted((ROOT / "configs").rglob("*"))
    if folder.is_dir()
]


def read_version() -> str:
    for line in (ROOT / "kmax_d2" / "__init__.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split('"')[1]
    raise RuntimeError("kmax_d2/__init__.py has no __version__")


setup(
    name="kmax_d2",
    version=read_version(),
    description="kMaX-DeepLab (k-means Mask Transformer) for Detectron2",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["kmax_d2", "kmax_d2.*"]) + CONFIG_PACKAGES,
    # The configs lie at the top level, as in every Detectron2 project, and are installed inside the package.
    package_dir={"kmax_d2.configs": "configs"},
    package_data={package: ["*.yaml"] for package in CONFIG_PACKAGES} | {"kmax_d2": ["assets/*"]},
    # detectron2 is not on PyPI, so pip cannot be asked for it: the README says how to get it.
    install_requires=[
        "torch>=2.1",
        "torchvision",
        "fvcore",
        "timm>=0.9",
        "huggingface_hub",
        "safetensors",
        "scipy",
        "pycocotools",
        "panopticapi-lite",
        "opencv-python-headless",
        "Pillow>=9.1",
        "tabulate",
        "tensorboard",
    ],
    extras_require={
        "cityscapes": ["cityscapesscripts"],
        "dev": ["cityscapesscripts", "mypy", "pytest>=7", "ruff"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
)
