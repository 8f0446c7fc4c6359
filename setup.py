# SPDX-License-Identifier: GPL-2.0-or-later
"""Build the native code, and set the limited-API wheel tag.

setup.py is needed because pyproject.toml cannot declare cffi modules.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PLUGIN = "qemu_prefault.qemu-prefault-plugin"
NATIVE = "qemu_prefault/native"
PLUGIN_PARTS = ("common", "plugin")
FLAGS = runpy.run_path(str(Path(__file__).parent / NATIVE / "flags.py"))


def native_files(suffix: str) -> list[str]:
    """Return the plugin's files with this suffix, relative to the source tree."""
    here = Path(__file__).parent
    found = (path for part in PLUGIN_PARTS for path in (here / NATIVE / part).glob(f"*{suffix}"))
    return sorted(str(path.relative_to(here)) for path in found)


class BuildNative(build_ext):
    """A ``build_ext`` that omits the Python ABI tag from the plugin's file name."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("qemu-prefault-plugin"):
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


setup(
    cffi_modules=[f"{NATIVE}/build.py:ffibuilder"],
    ext_modules=[
        Extension(
            PLUGIN,
            sources=native_files(".c"),
            depends=native_files(".h"),
            include_dirs=[NATIVE],
            extra_compile_args=FLAGS["COMPILE_FLAGS"],
            extra_link_args=FLAGS["LINK_FLAGS"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
