"""Installs everything in two packages: `dlr_clip`, and its command lines `dlr_clip_cli`, which start without torch.

`dassl` goes inside, where `import dlr_clip` finds it unless there is another: an environment that has upstream Dassl
keeps it. `datasets` goes inside, too: Hugging Face's package has that name.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# The lowest versions are those that the code relies on (torchvision follows torch); no upper bounds.
REQUIRES = [
    "torch>=2.4",
    "torchvision>=0.19",
    "open_clip_torch>=3.0",  # CLIP architectures, OpenAI weights, tokenizer
    "huggingface_hub>=0.25",  # where open_clip keeps its safetensors
    "safetensors>=0.4.4",  # weights without pickles; a method that learns nothing has a file without tensors
    "yacs>=0.1.8",  # configs
    "pyyaml>=6.0",
    "numpy>=1.24",
    "pillow>=10.0",
    "scipy>=1.10",  # .mat annotation files, splines, t intervals
    "scikit-learn>=1.3",  # the digits, linear probe, t-SNE
    "torchmetrics>=1.2",  # metrics, also across processes
    "tabulate>=0.9",
    "tensorboard>=2.14",
    "tqdm>=4.65",
    "matplotlib>=3.7",
]
# xdist: a test process per core; setuptools: the tests build and install the package.
SERVE = ["gradio>=5.0"]  # scripts/serve.py
EXPORT = ["onnx>=1.17", "onnxscript>=0.7", "onnxruntime>=1.20"]  # scripts/export.py --format onnx
PARQUET = ["pyarrow>=15"]  # predict.py --stream parquet
TRANSFORMERS = ["transformers>=4.40"]  # tokenizers and text encoders of some backbones (SigLIP, NLLB, ...)
TRACK = ["wandb>=0.19", "mlflow>=2.14"]  # LOGGER wandb, mlflow
TEST = [
    *SERVE,
    *TRACK,
    *PARQUET,
    *EXPORT,
    *TRANSFORMERS,  # its CLIPModel is also compared with ours
    "peft>=0.11",  # whose low-rank adapters of CLIPModel are read and written
    "playwright>=1.45",  # drives a Chromium that is there
    *("pytest>=8.0", "pytest-xdist>=3.5", "hypothesis>=6.80", "submitit>=1.5", "setuptools>=70.1"),
    *("nbclient>=0.10", "ipykernel>=6.29"),  # run the notebook of examples/
]
CLUSTER = ["submitit>=1.5"]  # scripts/protocol.py --launcher submitit
# Pinned: another version may find other things, and .ci/run would fail without a change of ours.
LINT = ["ruff==0.17.6", "mypy==2.4.1"]
DEV = [*TEST, *LINT, "pytest-cov", "pre-commit>=3.5"]

# Package -> its folder in the checkout. What has to be found by another name lies in a folder of its own (_toolbox).
FOLDERS = {
    "dlr_clip": "trainers",
    "dlr_clip.datasets": "datasets",
    "dlr_clip.scripts": "scripts",
    "dlr_clip._configs": "configs",
    "dlr_clip._published": "published",
    "dlr_clip._toolbox.dassl": "dassl",
    "dlr_clip_cli": "dlr_clip_cli",
}
NOT_INSTALLED = ("dlr_clip.scripts.dev",)


def packages() -> list[str]:
    """Return the names of all packages."""
    inner = [f"{name}.{inner}" for name, folder in FOLDERS.items() for inner in find_packages(str(HERE / folder))]
    return [name for name in (*FOLDERS, *inner) if name not in NOT_INSTALLED]


setup(
    name="dlr-clip",
    version="0.1.0",
    description="Few-shot adaptation of CLIP: DLR-CLIP and its neighbors, as a plugin for the Dassl/CoOp family",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    package_dir=FOLDERS,
    packages=packages(),
    package_data={
        "dlr_clip.clip": ["assets/*"],
        "dlr_clip._configs": ["*/*.yaml", "*/*/*.yaml"],
        "dlr_clip._published": ["*.csv"],
    },
    entry_points={"console_scripts": ["dlr-clip = dlr_clip_cli.command:main"]},
    install_requires=REQUIRES,
    extras_require={
        "cluster": CLUSTER,
        "serve": SERVE,
        "track": TRACK,
        "transformers": TRANSFORMERS,
        "parquet": PARQUET,
        "export": EXPORT,
        "test": TEST,
        "lint": LINT,
        "dev": DEV,
    },
)
