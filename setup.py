"""Packaging of lowbit: the folder mapping, the dependencies, and the compiled CPU kernels.

`quant.kernels`, `quant.eval` and `quant.recipes` are the top-level folders of the same names. The C++ kernels are
compiled by `build_ext` into one shared library inside the package; where no compiler is found the package installs
without it, the kernels refuse with the reason, and the reference kernel serves.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

HERE = Path(__file__).resolve().parent
ROOTS = {"quant": "quant", "quant.kernels": "kernels", "quant.eval": "eval", "quant.recipes": "recipes"}
INNER = ("quant.kernels", "quant.eval")
packages = [*ROOTS, *(f"quant.{name}" for name in find_packages("quant"))]
packages += [f"{root}.{name}" for root in INNER for name in find_namespace_packages(ROOTS[root])]

spec = importlib.util.spec_from_file_location("lowbit_build", HERE / "kernels" / "cpu" / "build.py")
assert spec is not None
assert spec.loader is not None
kernels_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels_build)


class BuildKernels(build_ext):
    """Runs kernels/cpu/build.py; in an editable install beside the sources, else in the build folder."""

    def _folder(self) -> Path:
        return kernels_build.FOLDER if self.inplace else Path(self.build_lib) / "quant" / "kernels" / "cpu" / "csrc"

    def run(self) -> None:
        why = kernels_build.build_or_explain(self._folder())
        if why is not None:
            print(f"warning: lowbit installs without its C++ kernels: {why}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [str(path) for name in (kernels_build.LIBRARY, kernels_build.REASON) if (path := self._folder() / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """The library is called through ctypes: any Python 3 of this platform will do, but not any platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    name="lowbit",
    version="0.1.0",
    description="Low-bit quantization and deployment compiler for large language and speech models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=packages,
    package_dir=ROOTS,
    package_data={
        "quant": ["py.typed", "pages/*.html"],
        "quant.recipes": ["*.yaml"],
        "quant.kernels.cpu.csrc": ["*.cpp", "*.h"],
        "quant.kernels.gpu": ["*.json"],
    },
    ext_modules=[Extension("quant.kernels.cpu.csrc._lowbit_cpu", sources=[])],  # makes build_ext run; BuildKernels compiles
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    entry_points={
        "console_scripts": ["quantize = quant.cli:main"],
        "vllm.general_plugins": ["lowbit = quant.serve.vllm:register"],  # found by a vLLM in the same environment
    },
    install_requires=[
        "torch>=2.11,<2.15",  # tensors, compile, operators
        "transformers>=5.16,<5.24",  # model classes, tokenizers, the loader that serving users call
        "triton>=3.6,<3.10; platform_system == 'Linux'",  # GPU kernels and their ahead-of-time compilation
        "accelerate>=1.10,<2",  # empty models on the meta device, device maps
        "datasets>=4,<6",  # calibration text from a hub
        "safetensors>=0.6,<1",  # weights are read and written by name, without unpickling
        "scipy>=1.13,<2",  # tails of Student's t and the binomial, for p values
        "lm-eval>=0.4.9,<0.5",  # benchmark tasks
        "huggingface_hub>=1,<3",  # checkpoints by hub id
        "mwparserfromhell>=0.6.6,<0.8",  # plain text of the Wikipedia sample
        "gguf>=0.17,<1",  # reads the demo model's GGUF file
        "pyyaml>=6,<7",  # recipes
        "pydantic>=2.10,<3",  # recipes are validated, unknown keys are errors
        "jinja2>=3.1,<4",  # pages of `--html`
        "click>=8.1,<9",  # command line
        "rich>=13,<16",  # tables and progress bars
        "filelock>=3.15,<4",  # one run per output folder
        "psutil>=6,<8",  # memory in reports
        "jiwer>=4,<5",  # word error rate
        "soundfile>=0.13,<1",  # audio files
        "soxr>=0.5,<2",  # audio of other sample rates
    ],
    extras_require={
        "rivals": [  # other programs that `quantize bench --rivals` measures
            "llama-cpp-python>=0.3.30,<0.4",
            "torchao>=0.17,<0.20",
            "ctranslate2>=4.6,<5",
            "faster-whisper>=1.1,<2",
        ],
        "figures": ["matplotlib>=3.9,<4"],  # quant.eval.drawing
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3",
            "ruff>=0.9",
            "mypy>=1.14",
            "types-PyYAML",
            "build>=1.2",
            "setuptools>=77",
            "compressed-tensors>=0.20,<0.21",  # what exported folders are compared with
        ],
    },
)
