# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests that run on the host and boot the nested lab."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: boots the nested lab (minutes, no KVM needed)")
