# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the public API is complete and typed, and includes the 0.1 names."""

from __future__ import annotations

import importlib
import pydoc
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import qemu_prefault
from qemu_prefault import Options, Populate, errors


@pytest.mark.parametrize("name", qemu_prefault.__all__)
def test_exported_names_exist(name: str) -> None:
    assert getattr(qemu_prefault, name) is not None
    assert name in dir(qemu_prefault)


def test_every_error_is_exported() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.QemuPrefaultError)
    }
    assert found <= set(qemu_prefault.__all__)


def test_help_shows_the_api() -> None:
    text = pydoc.plain(pydoc.render_doc(qemu_prefault))
    assert "prefault_async(" in text and "class Options" in text


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = qemu_prefault.nonesuch


def test_import_loads_no_heavy_modules() -> None:
    program = "import sys, qemu_prefault; print('asyncio' in sys.modules, 'cffi' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"


def test_blocking_prefault_raises_named_errors(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="does not exist"):
        qemu_prefault.prefault(str(tmp_path / "absent"))


SCRIPT = """\
import qemu_prefault
from qemu_prefault import Options, Populate, Report


def show(phase: str, done: int, total: int) -> None:
    print(phase, done, total)


options = Options(populate=Populate.RESIDENT, max_downtime=0.1)
report: Report = qemu_prefault.prefault("/run/vm.qmp", options, on_progress=show)
print(report.bytes.remaining, report.exit_status.name)
"""


def test_downstream_script_is_fully_typed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--strict", "--disallow-any-expr", str(script)]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named mypy" in done.stderr:
        pytest.skip("mypy is not installed")
    assert done.returncode == 0, done.stdout


# --- names from version 0.1 ---


def test_deprecated_policy_is_options() -> None:
    with pytest.deprecated_call(match="Use qemu_prefault's Options"):
        policy = qemu_prefault.Policy(Populate.ALL, populate_only=True)
    assert isinstance(policy, Options)
    assert (policy.populate, policy.populate_only) == (Populate.ALL, True)


def test_deprecated_session_still_opens(tmp_path: Path) -> None:
    async def main() -> None:
        async with qemu_prefault.Session.open(str(tmp_path / "absent")):
            pass

    with pytest.deprecated_call(match="prefault_async"), pytest.raises(errors.InputError):
        importlib.import_module("asyncio").run(main())


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("qemu_prefault.survey", ("ram_map", "counters", "counters_header", "RamMap")),
        ("qemu_prefault.scripting", ("parser", "run", "show")),
    ],
)
def test_deprecated_modules_still_work(module: str, names: tuple[str, ...]) -> None:
    sys.modules.pop(module, None)
    with pytest.deprecated_call(match="deprecated"):
        found = importlib.import_module(module)
    assert [name for name in names if not hasattr(found, name)] == []


def test_old_lab_module_names_its_successor(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        runpy.run_module("qemu_prefault.lab", run_name="__main__")
    assert ended.value.code == 2
    assert "python -m qemu_prefault_lab" in capsys.readouterr().err
