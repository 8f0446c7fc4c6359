# SPDX-License-Identifier: GPL-2.0-or-later
# For avocado-vt's `test_pre_hook = /PATH/prefault_hook.py`, which executes it at the start of each
# test, with that test's `params`: makes `prefault = yes` mean something in any test there is.
import os
import sys

params = locals()["params"]
sys.path.insert(0, os.path.dirname(params["test_pre_hook"]))

import prefault_vt  # noqa: E402

prefault_vt.enable(params)
