"""Package metadata. The versions here are ranges; `constraints.txt` pins a set that was tested together."""

from setuptools import find_namespace_packages, setup

setup(
    name="megalite",
    version="0.1.0",
    description="Megatron-style parallel training of decoder-only language models on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels/` stands beside the library in the tree and is imported as megalite.kernels.
    packages=[*find_namespace_packages(include=["megalite", "megalite.*"]), "megalite.kernels"],
    package_dir={"megalite.kernels": "kernels"},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "pydantic>=2.7",
        "tensorboard>=2.14",
        "tqdm>=4.66",
        "psutil>=5.9",
    ],
    extras_require={
        "hf": ["transformers>=5.0", "accelerate>=1.1"],  # the second for tools/bench_train.py, whose peer wants it
        "zstd": ["zstandard>=0.22"],  # reading .zst
        "parquet": ["pyarrow>=14"],  # reading .parquet
        "fast": ["gigatoken>=0.10,<0.11"],  # a faster encoder of documents
        "triton": ["triton>=3.6"],  # compiles the kernels; torch for CUDA brings its own
        "test": [
            "pytest>=8.0",
            "pytest-xdist>=3.8",
            "ruff>=0.15",
            "transformers>=5.0",
            "accelerate>=1.1",
            "zstandard",
            "pyarrow",
            "gigatoken",
            "triton>=3.6; platform_system == 'Linux'",
        ],
    },
)
