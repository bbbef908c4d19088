"""Metadata and the mapping of the top-level folders to the import names ``ipfm.*``.

``ipfm`` is a namespace package without ``__init__.py``; a plain top-level ``kernels`` would overwrite an unrelated
package of that name in site-packages.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
DATASETS = ["pyarrow>=15"]
ONNX = ["onnx>=1.18", "onnxscript>=0.6", "onnxruntime>=1.22"]
LATENTS = ["diffusers>=0.32"]
FOLDERS = ("engine", "kernels", "models", "recipes")


def packages() -> list[str]:
    """``ipfm.<folder>`` and every sub-package below it, and what ``python -m ipfm`` runs."""
    names = ["ipfm"]
    for folder in FOLDERS:
        names.append(f"ipfm.{folder}")
        names += [f"ipfm.{folder}.{sub}" for sub in find_packages(str(HERE / folder))]
    return names


setup(
    name="ipfm",
    version="0.1.0",
    description="Distils PFGM++ and diffusion image models into one- to four-step generators "
    "by Inverse Poisson Flow Matching",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_data={f"ipfm.engine.commands.{room}": ["*.j2"] for room in ("compare", "doctor", "pages", "report")},
    package_dir={"ipfm": "engine/commands/module", **{f"ipfm.{folder}": folder for folder in FOLDERS}},
    install_requires=[
        "torch>=2.10,<2.14",
        "triton>=3.6,<3.8",
        "numpy>=1.26",
        "xformers>=0.0.34",
        "deepspeed>=0.19,<0.20",
        "nvidia-ml-py>=12",
        "safetensors>=0.4.5",
        "tqdm>=4.66",
        "Pillow>=10.1",
        "matplotlib>=3.8",
        "Jinja2>=3.1",
        "tensorboard>=2.16",
        "tyro==1.0.17",
        "shtab>=1.8",
        "scikit-learn>=1.4",
        "scipy>=1.11",
    ],
    extras_require={
        # `ipfm export --format onnx`: torch's exporter is written with onnxscript; onnxruntime checks what it made.
        "onnx": ONNX,
        # Images in parquet and arrow files, as Hugging Face's `datasets` writes them.
        "datasets": DATASETS,
        # The autoencoder between pictures and the latents of EDM2's networks.
        "latents": LATENTS,
        "test": [
            *ONNX,
            *DATASETS,
            *LATENTS,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "setuptools>=77",
            "mypy>=1.13",
            "import-linter>=2.1",
            "build>=1.2",
        ],
    },
    entry_points={"console_scripts": ["ipfm = ipfm.engine.commands.main:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
