# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the plugin, the hook and ``--domain`` with libvirtd and confined QEMUs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Unpack

import pytest

from qemu_prefault.agents.qemu_process import helper_threads
from qemu_prefault.host.pagemap import Pagemap
from qemu_prefault.libvirt.install import APPARMOR_RULE, RULE_TEXT, install
from qemu_prefault.libvirt.prelaunch import ram_mapping
from qemu_prefault_lab.libvirtd import (
    LabDomain,
    Libvirtd,
    Syslog,
    denials,
    kernel_log,
    wait_until,
)
from support.libvirt import (
    MAX_RESIDUAL_FAULTS,
    METRICS_ADDRESS,
    WORKLOAD_MIB,
    DomainOptions,
    MakeDomain,
    WriteHookConfig,
    apparmor_label,
    read_metrics,
    run_tool,
    tool_output,
)

pytestmark = pytest.mark.libvirt

full = pytest.mark.full  # runs only in make test-full, because starting a domain takes seconds


# --- the plugin in a domain ---


def test_enabled_domain_boots_without_faults(make_domain: MakeDomain) -> None:
    before = len(kernel_log())
    kept = make_domain("kept")
    tool_output("libvirt", "enable", "kept")
    kept.start()
    kept.wait_ready()
    assert apparmor_label(kept) == f"libvirt-{kept.uuid} (enforce)"
    assert kept.faults() < MAX_RESIDUAL_FAULTS
    status = json.loads(tool_output("libvirt", "status", "kept", "--json"))
    assert status["enabled"] and status["current"] and status["running"]
    assert status["plugin"]["counters"]["errors"] == 0, status
    kept.check_memory()
    about_us = [line for line in denials(before) if "prefault" in line or "pagemap" in line]
    assert about_us == []


@full
def test_disable_restores_xml(make_domain: MakeDomain) -> None:
    plain = make_domain("plain", workload_mib=0)
    before = plain.virsh("dumpxml", "--inactive")
    tool_output("libvirt", "enable", "plain")
    assert "qemu-prefault-plugin" in plain.virsh("dumpxml", "--inactive")
    assert run_tool("libvirt", "enable", "plain").stderr.count("already") == 1
    tool_output("libvirt", "disable", "plain")
    assert plain.virsh("dumpxml", "--inactive") == before
    assert run_tool("libvirt", "status", "plain").returncode == 3


@full
def test_virsh_fallback(make_domain: MakeDomain, tmp_path: Path) -> None:
    plain = make_domain("plain", workload_mib=0)
    (tmp_path / "libvirt.py").write_text("raise ImportError\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command, there in (("enable", True), ("disable", False)):
        subprocess.run(
            ["qemu-prefault", "libvirt", command, "plain"], check=True, env=environment, timeout=60
        )
        assert ("qemu-prefault-plugin" in plain.virsh("dumpxml", "--inactive")) is there


@full
def test_unknown_domain_is_usage_error(libvirtd: Libvirtd) -> None:
    for arguments in (
        ("libvirt", "enable", "no-such"),
        ("libvirt", "status", "no-such"),
        ("libvirt", "start", "no-such"),
        ("probe", "--domain", "no-such"),
        ("--domain", "no-such"),
    ):
        done = run_tool(*arguments)
        assert done.returncode == 2 and "no-such" in done.stderr, (arguments, done)


# --- the hook ---


def saved_guest(make_domain: MakeDomain, **options: Unpack[DomainOptions]) -> LabDomain:
    guest = make_domain("saved", **options)
    guest.start()
    guest.wait_ready()
    guest.check_memory()
    guest.virsh("managedsave")
    return guest


def test_restored_guest_is_prefaulted(make_domain: MakeDomain, syslog: Syslog) -> None:
    asked = "<p:hook xmlns:p='urn:qemu-prefault:1' restore='now'/>"
    guest = saved_guest(make_domain, metadata=f"<metadata>{asked}</metadata>")
    guest.start()
    guest.check_memory()
    assert guest.faults() < MAX_RESIDUAL_FAULTS, syslog.lines()
    assert syslog.lines("prefaulted before the guest runs"), syslog.lines()
    assert not helper_threads(guest.process.pid)


@full
@pytest.mark.parametrize("shape", [("q35", 2816, 2048), ("pc", 3584, 3072)], ids=["q35", "pc"])
def test_restored_guest_above_4_gib(
    make_domain: MakeDomain,
    write_hook_config: WriteHookConfig,
    syslog: Syslog,
    shape: tuple[str, int, int],
) -> None:
    machine, mib, low_mib = shape
    write_hook_config('[default]\nrestore = "now"\npopulate = "resident"\nwait = 50\n')
    guest = saved_guest(make_domain, machine=machine, memory_mib=mib)
    guest.start()
    guest.check_memory()
    assert guest.faults() < MAX_RESIDUAL_FAULTS, syslog.lines()
    with Pagemap(guest.process) as pagemap:
        ram = ram_mapping(guest.process.maps(), mib << 20)
        high = pagemap.sums(ram.start + (low_mib << 20), (mib - low_mib) << 20, True)
    # Linux allocates from the highest addresses, so the workload's memory is in this range.
    assert high.writable >= WORKLOAD_MIB << 20


@full
def test_hook_timeout_hands_over(
    make_domain: MakeDomain, write_hook_config: WriteHookConfig, syslog: Syslog
) -> None:
    guest = saved_guest(make_domain)
    write_hook_config('[default]\nrestore = "now"\nwait = 0.001\n')
    guest.start()
    wait_until(lambda: syslog.lines("verified") or syslog.lines("prefaulted"), "its report")
    assert syslog.lines("the time limit expired"), syslog.lines()
    assert syslog.lines("to prefault the guest"), syslog.lines()
    guest.check_memory()


def test_guest_starts_if_hook_is_killed(
    make_domain: MakeDomain, write_hook_config: WriteHookConfig, syslog: Syslog
) -> None:
    guest = saved_guest(make_domain)
    write_hook_config('[default]\nrestore = "now"\n')
    killed: list[str] = []
    done = threading.Event()

    def kill() -> None:
        while not killed and not done.is_set():
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if b"python" in words[0] and b"hook" in words and b"started" in words:
                        os.kill(int(entry.name), signal.SIGKILL)
                        killed.append(entry.name)

    killer = threading.Thread(target=kill)
    killer.start()
    guest.start()
    done.set()
    killer.join()
    assert killed
    assert guest.state == "running"
    guest.check_memory()
    wait_until(lambda: not helper_threads(guest.process.pid), "the helpers have exited")


@full
def test_guest_starts_with_broken_config(
    make_domain: MakeDomain, write_hook_config: WriteHookConfig, syslog: Syslog
) -> None:
    write_hook_config("[default]\nrestore = 'perhaps'\n")
    guest = make_domain("broken", workload_mib=0)
    guest.start()
    guest.wait_ready()
    assert syslog.lines("'perhaps'"), syslog.lines()


def test_libvirtd_restart_keeps_guest(
    make_domain: MakeDomain, write_hook_config: WriteHookConfig, syslog: Syslog, libvirtd: Libvirtd
) -> None:
    """Check that guests keep running when libvirtd calls the hook with ``reconnect``."""
    write_hook_config('[default]\nrestore = "now"\nstart = "follow"\n')
    guest = make_domain("stays")
    guest.start()
    guest.wait_ready()
    for number in (signal.SIGTERM, signal.SIGKILL):
        libvirtd.restart(number)
        assert guest.state == "running"
        guest.check_memory()


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=full)])
def test_concurrent_domain_starts(
    make_domain: MakeDomain, write_hook_config: WriteHookConfig, libvirtd: Libvirtd, count: int
) -> None:
    write_hook_config('[default]\nrestore = "now"\n')
    names = [f"many{number}" for number in range(count)]
    guests = [
        make_domain(name, firmware_only=True, memory_mib=32, workload_mib=0) for name in names
    ]
    for name in names[::2]:
        tool_output("libvirt", "enable", name)
    with ThreadPoolExecutor(len(guests)) as executor:
        list(executor.map(lambda guest: guest.virsh("start", timeout=900), guests))
    assert {guest.state for guest in guests} == {"running"}


# --- AppArmor ---


def test_probe_reports_missing_apparmor_rule(make_domain: MakeDomain) -> None:
    rule = Path("/") / APPARMOR_RULE
    guest = make_domain("probed", workload_mib=0)
    tool_output("libvirt", "enable", "probed")
    rule.unlink()
    try:
        done = run_tool("probe", "--domain", "probed", "--json")
        findings: dict[str, dict[str, Any]] = {
            finding["check"]: finding for finding in json.loads(done.stdout)["findings"]
        }
        assert findings["apparmor"]["verdict"] == "no"
        assert RULE_TEXT.strip() in findings["apparmor"]["remedy"]
        assert done.returncode == 4
        # QEMU starts even if the rule is missing.
        guest.start()
        guest.wait_ready()
    finally:
        install()


def test_probe_running_domain(make_domain: MakeDomain) -> None:
    guest = make_domain("probed", workload_mib=0)
    tool_output("libvirt", "enable", "probed")
    guest.start()
    guest.wait_ready()
    findings = json.loads(tool_output("probe", "--domain", "probed", "--json"))["findings"]
    verdicts = {f["check"]: f["verdict"] for f in findings}
    for check in ("daemon", "apparmor", "seccomp", "pages", "enable", "plugin", "prefault"):
        assert verdicts[check] == "ok", findings


# --- through libvirt's own monitor ---


def test_prefault_running_domain(make_domain: MakeDomain) -> None:
    guest = make_domain("running", workload_mib=0)
    guest.start()
    guest.wait_ready()
    report = json.loads(tool_output("--domain", "running", "--json"))
    assert report["bytes"]["remaining"] == 0
    assert guest.state == "running"
    before = guest.faults()
    guest.command("alloc 64")
    assert guest.faults() - before < MAX_RESIDUAL_FAULTS
    assert "custom-monitor" in guest.virsh("dominfo") + guest.log()
    for command in ("map", "stats"):
        assert json.loads(tool_output(command, "--domain", "running", "--json"))


def test_guard_resumes_domain(make_domain: MakeDomain, libvirtd: Libvirtd) -> None:
    guest = make_domain("killed")
    guest.start()
    guest.wait_ready()
    for _ in range(3):
        child = subprocess.Popen(
            ["qemu-prefault", "--domain", "killed"], stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        paused = False
        while child.poll() is None and not paused:
            paused = guest.state == "paused"
        child.kill()
        child.wait()
        wait_until(lambda: guest.state == "running", "the resume guard resumes the guest")
        wait_until(lambda: not helper_threads(guest.process.pid), "the helpers have exited")
    guest.check_memory()


@full
def test_stats_survive_libvirtd_restart(make_domain: MakeDomain, libvirtd: Libvirtd) -> None:
    guest = make_domain("watched", workload_mib=0)
    guest.start()
    guest.wait_ready()
    child = subprocess.Popen(
        ["qemu-prefault", "stats", "--watch", "--json", "--domain", "watched"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert json.loads(child.stdout.readline())
        libvirtd.restart(signal.SIGKILL)
        for _ in range(3):
            assert json.loads(child.stdout.readline())
    finally:
        child.terminate()
        child.wait(30)


# --- the daemon ---


def test_watch_acts_and_exports_metrics(
    make_domain: MakeDomain, write_hook_config: WriteHookConfig, libvirtd: Libvirtd
) -> None:
    write_hook_config('[default]\nstart = "later"\n')
    child = subprocess.Popen(
        ["qemu-prefault", "libvirt", "watch", "--listen", METRICS_ADDRESS, "--act"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

    try:
        wait_until(lambda: "qemu_prefault_libvirt_up 1.0" in read_metrics(), "the daemon connects")
        guest = make_domain("fleet", workload_mib=0)
        guest.start()
        guest.wait_ready()
        verified = 'qemu_prefault_runs_total{domain="fleet",moment="start",outcome="'
        wait_until(lambda: verified in read_metrics(), "a run is counted")
        assert 'qemu_prefault_stage2_faults_total{domain="fleet"}' in read_metrics()
        libvirtd.restart()
        guest.destroy()
        wait_until(lambda: 'faults_total{domain="fleet"}' not in read_metrics(), "metrics removed")
    finally:
        child.terminate()
        _, log = child.communicate(timeout=30)
    assert "fleet booted" in log and "is lost" in log, log
    assert "Traceback" not in log


@full
def test_watch_writes_textfile(make_domain: MakeDomain, tmp_path: Path) -> None:
    guest = make_domain("fleet", workload_mib=0)
    guest.start()
    guest.wait_ready()
    path = tmp_path / "qemu-prefault.prom"
    from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415

    def samples(text: str) -> dict[tuple[str, str], float]:
        return {
            (sample.name, sample.labels.get("domain", "")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    child = subprocess.Popen(["qemu-prefault", "libvirt", "watch", "--textfile", str(path)])
    try:
        wait_until(path.exists, "the file exists")
        with path.open() as first:
            inode = os.fstat(first.fileno()).st_ino
            wait_until(lambda: path.stat().st_ino != inode, "the file is replaced")
            # The tool replaces the file instead of overwriting it, so readers see a complete file.
            assert ("qemu_prefault_libvirt_up", "") in samples(first.read())
        values = samples(path.read_text())
        assert values["qemu_prefault_libvirt_up", ""] == 1
        assert values["qemu_prefault_plugin", "fleet"] == 0
        assert 0 < values["qemu_prefault_stage2_faults_total", "fleet"] <= guest.faults()
    finally:
        child.terminate()
        assert child.wait(60) == 0
    # The tool must remove the file, so that no reader uses outdated metrics.
    assert list(tmp_path.iterdir()) == []
