"""A plugin for pytest: the tests that follow take the C++ kernels from the folder EMULATED."""

import os
from pathlib import Path

from quant.kernels.cpu import library

library.FOLDER = Path(os.environ["EMULATED"])
