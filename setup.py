# SPDX-License-Identifier: GPL-2.0-or-later
"""Only what pyproject.toml has no form for: the cffi module and its limited-API wheel tag."""

from setuptools import setup

setup(
    cffi_modules=["qemu_prefault/native/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
