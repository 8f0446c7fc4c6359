# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the avocado tests on this host or in the lab. ``make`` uses this program.

    python avocado/run.py distro [--distro NAME]... [--profile NAME]... [-- AVOCADO-ARGUMENT...]
    python avocado/run.py vt [--tp-qemu DIRECTORY] [-- REFERENCE...]
    python avocado/run.py check

If this host's KVM can prefault, the tests run on this host. Otherwise they run in the nested lab.
The program keeps the job's results (HTML, JSON, xunit, each test's log) in the cache and prints
their path. The last line of output is ``N passed, N failed, N skipped``. The exit status is 0 only
if no test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qemu_prefault.errors import FailedError, QemuPrefaultError
from qemu_prefault_lab import cache, distro
from qemu_prefault_lab.distro import PASSWORD
from qemu_prefault_lab.launch import open_machine
from qemu_prefault_lab.machine import Machine
from qemu_prefault_lab.nested import Lab
from qemu_prefault_lab.patched import uefi_emulator
from qemu_prefault_lab.system import DISTROS_VARIABLE, GUEST_KERNEL_ARGS

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # make sets PYTHONSAFEPATH, which excludes this directory

from summary import summarize  # noqa: E402

REQUIREMENTS = HERE / "requirements.txt"
VT_DISTRO = "debian13"
VT_REQUIREMENTS = HERE / "vt/requirements.txt"
HOURS = 3600.0
# The profiles in variants.yaml, the images in cloud.yaml, and the tests in distro.py.
PROFILES = ("pc", "q35", "microvm", "memfd", "hugetlb", "thp", "vcpus", "ovmf")
CLOUDS = ("Fedora", "Ubuntu", "Alpine", "OpenSUSE")
EVENTS = ("attach", "boot", "reset", "restore", "migrate", "hotplug")
# This test boots 20 guests, so it runs only on request.
ON_REQUEST = ("start",)


def wheels(*requirements: Path) -> list[Path]:
    """Return the wheels of the required packages, downloaded unless cached."""

    def fill(directory: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        pip += ["--require-hashes", "--only-binary", ":all:"]
        files = [word for path in requirements for word in ("-r", str(path))]
        subprocess.run([*pip, "-d", str(directory), *files], check=True)

    key = cache.key_of(*(path.read_bytes() for path in requirements), sys.version)
    return sorted(cache.entry("avocado-wheels", key, fill).glob("*.whl"))


def site(*requirements: Path) -> Path:
    """Return a directory with the unpacked wheels, for this host's Python."""
    packed = wheels(*requirements)

    def fill(directory: Path) -> None:
        for wheel in packed:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(directory)

    return cache.entry("avocado-site", cache.key_of(*map(str, packed)), fill)


def python_on(directory: Path, *argv: str) -> str:
    """Run Python with the modules in ``directory`` and ``HERE``, and return stdout."""
    with tempfile.TemporaryDirectory() as home:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", *argv],
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": f"{directory}:{HERE}", "HOME": home},
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise FailedError(f"{argv[:4]} failed", result.stdout + result.stderr)
    return result.stdout


# Print one line of JSON per name, with the image's path or the reason why it is absent.
FETCH_CLOUD_IMAGES = """
import json, sys
from cloud_images import NoImageError, base_image

for name in sys.argv[2:]:
    answer = {"name": name}
    try:
        answer["path"] = str(base_image(name, sys.argv[1]))
    except NoImageError as error:
        answer["reason"] = str(error)
    print(json.dumps(answer))
"""


def cloud_images() -> dict[str, Path | str]:
    """Download the cloud images, and return the path or the error message for each."""
    directory = cache.subdirectory("cloud-images")
    said = python_on(site(REQUIREMENTS), "-c", FETCH_CLOUD_IMAGES, str(directory), *CLOUDS)
    answers = [json.loads(line) for line in said.splitlines()]
    return {a["name"]: Path(a["path"]) if "path" in a else a["reason"] for a in answers}


@dataclass(frozen=True)
class TestMachine:
    """The machine on which the tests run, and the tests' directories on it.

    :ivar distros: The directory with the distributions, which is the value of
        ``QEMU_PREFAULT_DISTROS``.
    """

    machine: Machine
    directory: str
    distros: str


def open_test_machine(
    names: Sequence[str],
    requirements: Sequence[Path],
    nested: bool,
    clouds: Mapping[str, Path | str] | None = None,
    uefi: bool = False,
) -> TestMachine:
    """Open a machine, and install avocado, this package and the images on it.

    This package is installed from the wheels that ``scripts/with-env`` has built.

    :param uefi: Whether the machine must be able to run KVM guests with UEFI.
    """
    package = [Path(wheel) for wheel in os.environ["QEMU_PREFAULT_WHEELS"].split()]
    images = {name: distro.build(distro.distro_named(name)) for name in names}
    disks = [path for built in images.values() for path in (built.disk, distro.boot_disk(built))]
    clouds = clouds or {}
    disks += [path for path in clouds.values() if isinstance(path, Path)]
    emulator = partial(uefi_emulator, HERE.parent / "patches") if uefi else None
    machine = open_machine("avocado", nested=nested, disks=disks, emulator=emulator)
    machine.install([*wheels(*requirements), *package])
    directory = machine.run(["mktemp", "-d", "/var/tmp/avocado-XXXXXX"]).text.strip()  # nosec B108
    distros = f"{directory}/distros"
    for number, (name, built) in enumerate(images.items()):
        path = f"{distros}/{name}"
        if isinstance(machine, Lab):
            disk, boot = (f"/dev/vd{chr(ord('c') + 2 * number + part)}" for part in (0, 1))
            script = 'mkdir -p "$1/boot"; ln -s "$2" "$1/disk"; mount -o ro "$3" "$1/boot"'
        else:
            disk, boot = str(built.disk), str(built.boot)
            script = 'mkdir -p "$1"; ln -s "$2" "$1/disk"; ln -s "$3" "$1/boot"'
        machine.run(["sh", "-ec", script, "sh", path, disk, boot])
    for name, cloud in clouds.items():
        path = f"{distros}/cloud/{name}"
        script = 'mkdir -p "$(dirname "$1")"; ln -s "$2" "$1"'
        if isinstance(cloud, Path):
            source = str(cloud)
            if isinstance(machine, Lab):
                source = f"/dev/vd{chr(ord('c') + disks.index(cloud))}"
        else:
            script, source = script.replace("ln -s", 'echo "$2" >"$1.missing"; :'), cloud
        machine.run(["sh", "-ec", script, "sh", path, source])
    for part in ("avocado", "tests/support"):
        machine.put(HERE.parent / part, f"{directory}/{part}")
    return TestMachine(machine, directory, distros)


def avocado(target: TestMachine, arguments: Sequence[str], timeout: float = HOURS) -> int:
    """Run avocado on the machine, forward its output, and return its exit status."""
    base = target.directory
    paths = "".join(
        f"{key} = {base}/{value}\n"
        for key, value in {
            "base_dir": "base",
            "data_dir": "data",
            "logs_dir": "results",
            "test_dir": "avocado",
        }.items()
    )
    text = f"[datadir.paths]\n{paths}cache_dirs = ['{base}/cache']\n"
    # Do not use --config: avocado-vt needs its directories before avocado reads that file.
    script = "mkdir -p .config/avocado && cat >.config/avocado/avocado.conf"
    target.machine.run(["sh", "-c", script], cwd=base, stdin=text.encode())
    argv = ["python3", "-m", "avocado", *arguments]
    if not isinstance(target.machine, Lab):
        # avocado starts its runners with the system's Python, which does not have these modules.
        script = 'export PYTHONPATH="$PYTHONPATH:$1"; shift; exec "$@"'
        argv = ["sh", "-c", script, "sh", ":".join(filter(None, sys.path)), *argv]
    env = {DISTROS_VARIABLE: target.distros, "HOME": base, "PYTHONUNBUFFERED": "1"}
    env["PYTHONWARNINGS"] = "ignore"
    result = target.machine.run(
        argv, timeout=timeout, check=False, env=env, cwd=f"{base}/avocado", on_output=show
    )
    return result.returncode


def show(fd: int, data: bytes) -> None:
    stream = sys.stdout.buffer if fd == 1 else sys.stderr.buffer
    stream.write(data)
    stream.flush()


def collect(target: TestMachine, kind: str) -> Path:
    """Copy the job's results to this host and return their directory."""
    directory = cache.subdirectory("results") / time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    latest = f"{target.directory}/results/latest"
    target.machine.get(
        target.machine.run(["readlink", "-f", latest]).text.strip(),
        directory,
    )
    return directory


SERIALLY = ("--max-parallel-tasks", "1", "--disable-sysinfo")


def run_distro(options: argparse.Namespace) -> int:
    names = options.distro or list(distro.DISTROS)
    tests = [f"distro.py:DistroTest.test_{name}" for name in options.test or EVENTS]
    wanted = [f"/run/distro/{name}" for name in names]
    wanted += [f"/run/profile/{name}" for name in options.profile or PROFILES[:1]]
    variants = ["-m", "variants.yaml", "--mux-filter-only", *wanted]
    order = ["--execution-order", "tests-per-variant"]
    timeout = options.hours * HOURS
    jobs = []
    everything = not (options.distro or options.test)
    clouds = cloud_images() if everything else {}
    uefi = "ovmf" in (options.profile or ())
    with (target := open_test_machine(names, [REQUIREMENTS], options.nested, clouds, uefi)).machine:
        avocado(target, ["run", *tests, *variants, *order, *SERIALLY, *options.arguments], timeout)
        jobs.append(collect(target, "avocado"))
        if everything:
            avocado(target, ["run", "cloud.py", "-m", "cloud.yaml", *SERIALLY], timeout)
            jobs.append(collect(target, "avocado-cloud"))
    return sum_up(jobs)


def sum_up(jobs: Sequence[Path]) -> int:
    """Print the summary of the jobs and return this program's exit status."""
    counts = Counter[str]()
    for results in jobs:
        lines, found = summarize(results)
        counts += found
        print("\n".join(lines))
    print(", ".join(f"{counts[what]} {what}" for what in ("passed", "failed", "skipped")))
    return 1 if counts["failed"] or not counts["passed"] else 0


# The parameters that avocado-vt needs for this guest and for a host with an emulated CPU.
VT_PARAMS = {
    "image_name": "images/guest",
    "image_format": "qcow2",
    "drive_format": "virtio",
    "force_create_image": "no",
    "backup_image_before_testing": "yes",
    "restore_image_after_testing": "yes",
    "vm_accelerator": "kvm",
    "mem": "512",
    "auto_cpu_model": "no",
    "cpu_model": "host",
    "smp": "1",
    "vcpu_maxcpus": "1",
    "monitor_type": "qmp",
    "nics": "",
    "usbs": "",
    "usb_devices": "",
    "vga": "",
    "serial_login": "yes",
    "force_reset_go_down_check": "qmp",
    "login_timeout": "1800",
    "username": "root",
    "password": PASSWORD,
    "shell_prompt": r"[\#\$]\s*$",
    "kill_vm": "yes",
    "kill_vm_gracefully": "no",
    "verify_guest_dmesg": "no",
    "take_regular_screendumps": "no",
    "store_vm_info": "no",
    "encode_video_files": "no",
}
# Tests from avocado-vt's own provider that run with `prefault = yes` and no other change.
VT_OWN = ("tp-qemu.boot", "tp-qemu.reboot")
VT_SETUP = """
cd "$1"
data=data/avocado-vt
mkdir -p $data/images $data/virttest/test-providers.d/downloads/.local
qemu-img create -q -f qcow2 -F raw -b "$(readlink -f "$2")" $data/images/guest.qcow2
sed "s,^uri:.*,uri: file://$1/avocado/vt," avocado/vt/qemu-prefault.ini \
	>$data/virttest/test-providers.d/qemu-prefault.ini
if [ -d tp-qemu ]; then
	printf '%s\n' "[provider]" "uri: file://$1/tp-qemu" "[generic]" "subdir: generic/" \
		"[qemu]" "subdir: qemu/" >$data/virttest/test-providers.d/tp-qemu.ini
fi
"""


def run_vt(options: argparse.Namespace) -> int:
    requirements = [VT_REQUIREMENTS]
    jobs = []
    with (
        target := open_test_machine([VT_DISTRO], requirements, options.nested)
    ).machine as machine:
        base = target.directory
        if options.tp_qemu:
            for part in ("generic", "qemu", "provider"):
                put_python(machine, options.tp_qemu / part, f"{base}/tp-qemu/{part}")
        machine.run(["sh", "-ec", VT_SETUP, "sh", base, f"{target.distros}/{VT_DISTRO}/disk"])
        bootstrap = ["vt-bootstrap", "--vt-type", "qemu", "--vt-no-downloads", "--yes-to-all"]
        if avocado(target, [*bootstrap, "--vt-update-config"]):
            return 1
        # This hook implements `prefault = yes`.
        hook = f"test_pre_hook = {base}/avocado/vt/prefault_hook.py"
        shared = f"{base}/data/avocado-vt/backends/qemu/cfg/tests-shared.cfg"
        machine.run(["sh", "-c", 'echo "$1" >>"$2"', "sh", hook, shared])
        boot = {f: f"{target.distros}/{VT_DISTRO}/boot/{f}" for f in ("vmlinuz", "initrd")}
        params = VT_PARAMS | {"kernel": boot["vmlinuz"], "initrd": boot["initrd"]}
        params["kernel_params"] = GUEST_KERNEL_ARGS
        with huge_pages_off(machine):
            own = options.arguments or ["qemu-prefault.prefault"]
            jobs.append(run_vt_job(target, own, params, options))
            if options.tp_qemu:
                params |= {"prefault": "yes", "reboot_count": "1"}
                jobs.append(run_vt_job(target, list(VT_OWN), params, options))
    return sum_up(jobs)


def run_vt_job(
    target: TestMachine,
    references: Sequence[str],
    params: dict[str, str],
    options: argparse.Namespace,
) -> Path:
    arguments = ["run", *references, *SERIALLY]
    arguments += ["--vt-type", "qemu", "--vt-machine-type", "q35"]
    arguments += ["--vt-qemu-bin", "/usr/bin/qemu-system-x86_64"]
    for key, value in params.items():
        arguments += ["--vt-extra-params", f"{key}={value}"]
    avocado(target, arguments, options.hours * HOURS)
    return collect(target, "avocado-vt")


def put_python(machine: Machine, source: Path, destination: str) -> None:
    """Copy a provider's Python and configuration files, without its large data files."""
    with tempfile.TemporaryDirectory() as scratch:
        for path in source.rglob("*"):
            if path.suffix in (".py", ".cfg") and path.is_file():
                copy = Path(scratch) / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
        machine.put(Path(scratch), destination)


@contextlib.contextmanager
def huge_pages_off(machine: Machine) -> Iterator[None]:
    """Disable THP, with which guests take too few faults for a comparison."""
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    before = machine.run(["cat", path]).text.partition("[")[2].partition("]")[0]
    machine.run(["sh", "-c", f"echo never >{path}"])
    try:
        yield
    finally:
        machine.run(["sh", "-c", f"echo {before} >{path}"])


CHECK_VT = """
import runpy, sys
from pathlib import Path
from virttest.cartesian_config import Parser

provider = Path(sys.argv[1])
# Import the provider's "qemu" package first, as avocado-vt does. This package shadows the "qemu"
# package that qemu.qmp installs.
sys.path.insert(0, str(provider))
import qemu
for path in sorted((provider / "qemu/tests/cfg").glob("*.cfg")):
    text = "".join(f"    {line}\\n" for line in path.read_text().splitlines())
    parser = Parser()
    parser.parse_string(f"variants subtest:\\n{text}")
    for found in parser.get_dicts():
        runpy.run_path(provider / f"qemu/tests/{found['type']}.py")
        print(found["name"])
"""

CHECK_CLOUD = """
import functools, hashlib, http.server, sys, threading
from pathlib import Path
from cloud_images import AlpineImageProvider, NoImageError, base_image

class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

def publish(version, forged):
    release = tree / f"v{version}/releases/cloud"
    release.mkdir(parents=True)
    for kind in ("bios-cloudinit", "bios-tiny", "uefi-cloudinit"):
        image = release / f"nocloud_alpine-{version}.1-x86_64-{kind}-r0.qcow2"
        text = version + kind
        digest = hashlib.sha512(text.encode()).hexdigest()
        image.write_text(text + forged)
        image.with_name(image.name + ".sha512").write_text(f"{digest}  {image.name}\\n")

tree = Path(sys.argv[1])
publish("3.9", "")
publish("3.22", "")
(tree / "edge").mkdir()
serve = functools.partial(Handler, directory=tree)
with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
    threading.Thread(target=server.serve_forever).start()
    AlpineImageProvider.index = f"http://127.0.0.1:{server.server_port}/"
    try:
        print(base_image("Alpine", str(tree / "cache")).read_text())
        publish("3.23", "forged")
        try:
            print(base_image("Alpine", str(tree / "cache")).read_text())
        except NoImageError:
            print("refused")
    finally:
        server.shutdown()
"""


def run_check(_: argparse.Namespace) -> int:
    """Check that all tests, variants and images are found, without starting a guest.

    avocado lists its tests and variants, and avocado-vt's parser lists the provider's tests. A
    local HTTP server imitates Alpine's mirror, to test that the newest BIOS image is downloaded,
    and that an image with another digest is refused.
    """
    modules = site(VT_REQUIREMENTS)
    listed = python_on(modules, "-m", "avocado", "list", "distro.py", "cloud.py").splitlines()
    tests = [line for line in listed if "Test.test_" in line]
    shown = python_on(modules, "-m", "avocado", "variants", "-m", "variants.yaml").splitlines()
    variants = [line for line in shown if line.startswith("Variant run-")]
    provided = python_on(modules, "-c", CHECK_VT, str(HERE / "vt")).splitlines()
    print("\n".join([*tests, *variants, *provided]))
    wanted = len((*EVENTS, *ON_REQUEST)) + 1, len(distro.DISTROS) * len(PROFILES)
    if (len(tests), len(variants)) != wanted or not provided:
        raise FailedError("some tests or variants were not found", f"expected: {wanted}")
    with tempfile.TemporaryDirectory() as mirror:
        fetched = python_on(site(REQUIREMENTS), "-c", CHECK_CLOUD, mirror).strip()
    if fetched.splitlines() != ["3.22bios-cloudinit", "refused"]:
        raise FailedError(
            "the downloaded Alpine image is not the newest, or a forged image was accepted",
            f"images: {fetched}",
        )
    return 0


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="lab: %(message)s", stream=sys.stderr)
    # A failure's reason may quote a guest's console, with characters that stdout cannot encode.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(description="Run the avocado tests.")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--nested", action="store_true", help="do not use this host's KVM")
    common.add_argument("--hours", type=float, default=6.0, help="time limit of a job, in hours")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("distro", parents=[common], help="whole distributions")
    one.add_argument("--distro", action="append", choices=list(distro.DISTROS))
    one.add_argument("--profile", action="append", choices=PROFILES)
    one.add_argument("--test", action="append", choices=(*EVENTS, *ON_REQUEST))
    one.add_argument("arguments", nargs="*", help="more arguments for avocado run")
    one.set_defaults(run=run_distro)
    two = commands.add_parser("vt", parents=[common], help="tests for avocado-vt")
    two.add_argument("--tp-qemu", type=Path, help="directory of the tp-qemu test provider")
    two.add_argument("arguments", nargs="*", help="names of tests to run (default: all)")
    two.set_defaults(run=run_vt)
    three = commands.add_parser("check", help="only check that all tests are found")
    three.set_defaults(run=run_check)
    options = parser.parse_args()
    try:
        return int(options.run(options))
    except QemuPrefaultError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_status)


if __name__ == "__main__":
    sys.exit(main())
