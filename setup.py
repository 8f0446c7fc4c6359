# SPDX-License-Identifier: GPL-2.0-or-later
"""Only what pyproject.toml has no form for: the two native parts, and the limited-API wheel tag."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PLUGIN = "qemu_prefault.qemu-prefault-plugin"
NATIVE = "qemu_prefault/native"
PLUGIN_SOURCES = (
    *("plugin", "keeper", "slots", "events", "orders", "batch"),
    *("host_memory", "control_socket", "pagemap"),
)
PLUGIN_HEADERS = (
    *("keeper", "keeper_state", "host_memory", "control_socket", "pagemap", "prefault_loop"),
)


class BuildNative(build_ext):
    """The plugin is loaded by QEMU, not by Python: its name carries no Python version."""

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
            sources=[f"{NATIVE}/{name}.c" for name in PLUGIN_SOURCES],
            depends=[f"{NATIVE}/{name}.h" for name in PLUGIN_HEADERS],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
