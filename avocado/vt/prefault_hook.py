# SPDX-License-Identifier: GPL-2.0-or-later
# The hook for avocado-vt's `test_pre_hook = /PATH/prefault_hook.py`. avocado-vt executes this file
# at the start of each test, with the test's `params`. The hook implements `prefault = yes` for any
# test.
import os
import sys

params = locals()["params"]
sys.path.insert(0, os.path.dirname(params["test_pre_hook"]))

import prefault_vt  # noqa: E402

prefault_vt.enable(params)
