"""Everything is declared in pyproject.toml, and no kernel is compiled at install time.

With ``BYOLA_FAST_COMPILE=1`` a wheel contains the CPU kernels, compiled for the torch that is installed:

    BYOLA_FAST_COMPILE=1 pip wheel --no-build-isolation --no-deps .
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class WithKernels(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            sys.path.insert(0, str(Path(__file__).parent))
            from byola_fast.ops._native import cpu

            cpu.compile_into_wheel(Path(self.build_lib) / "byola_fast")


class OfAnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]  # the kernels do not use Python


class OfOnePlatform(Distribution):
    def has_ext_modules(self):
        return True


if os.environ.get("BYOLA_FAST_COMPILE", "") == "1":
    setup(cmdclass={"build_py": WithKernels, "bdist_wheel": OfAnyPython}, distclass=OfOnePlatform)
else:
    setup()
