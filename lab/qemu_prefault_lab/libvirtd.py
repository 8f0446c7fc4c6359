# SPDX-License-Identifier: GPL-2.0-or-later
"""A libvirt daemon and its domains, for tests in the lab's ``libvirt`` variant.

This module runs on the machine with KVM. The module starts Debian's libvirtd with the arguments in
libvirtd's systemd unit, and AppArmor enforces libvirtd's profiles. A second libvirtd runs in
separate mount, UTS and AppArmor namespaces, so it appears to be another host. Domains boot the same
guests as :mod:`qemu_prefault_lab.guest`. The lab does not run systemd. For tests that need systemd,
:class:`Systemd` runs systemd as PID 1 of a PID namespace.

The code runs in L1, which has no other users. Files in /tmp therefore need no random names.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shlex
import signal
import socket
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qemu_prefault.host.kvm import debugfs_faults
from qemu_prefault.host.procfs import Process
from qemu_prefault.libvirt.find_qemu import find_qemu

from .errors import LibvirtdError
from .guest import KERNEL_ARGS, l2_directory
from .serial import Answer, Serial
from .wait import wait_for

SERIALS = Path("/run/lab-serial")
PROFILES = ("usr.sbin.libvirtd", "usr.lib.libvirt.virt-aa-helper")
LOG = Path("/var/log/libvirt/qemu")
# Make QEMU write its log files itself, without virtlogd. All other settings are defaults.
_QEMU_CONF = 'stdio_handler = "file"\n'


def wait_until(condition: Callable[[], object], what: str, limit: float = 120.0) -> None:
    """Wait like :func:`wait_for`, with a time limit that suits libvirtd."""
    wait_for(condition, what, limit)


class Libvirtd:
    """A libvirt daemon.

    Leaving the context destroys the daemon's domains and stops the daemon.

    :param host: The name of a host to simulate. The daemon then runs in separate namespaces. None
        means that the daemon belongs to this machine.
    :param systemd: The systemd in whose namespaces and scope the daemon runs. None means that the
        daemon runs in the caller's namespaces and cgroup.
    """

    def __init__(self, *, host: str | None = None, systemd: Systemd | None = None) -> None:
        self._host = host
        self._systemd = systemd
        self._process: subprocess.Popen[bytes] | None = None
        self.domains: list[LabDomain] = []
        self.root = Path("/")
        _prepare_machine()
        self._qemu_conf = _QEMU_CONF
        _load_profiles(host)
        if host is not None:
            # Both daemons share one cgroup tree, and only one of them may manage it.
            self._qemu_conf += "cgroup_controllers = []\n"
        self.start()

    def __enter__(self) -> Libvirtd:
        return self

    def __exit__(self, *_: object) -> None:
        for domain in self.domains:
            domain.destroy()
        self.stop()

    @property
    def uri(self) -> str:
        path = self.root / "run/libvirt/libvirt-sock"
        return f"qemu+unix:///system?socket={path}"

    def start(self) -> None:
        """Start the daemon and wait until it responds."""
        words = ["/usr/sbin/libvirtd"]
        Path("/etc/libvirt/qemu.conf").write_text(self._qemu_conf)
        if self._host is not None:
            script = _OTHER_HOST.format(
                host=self._host, host_uuid=uuid.uuid4(), serials=SERIALS,
                conf=shlex.quote(self._qemu_conf),
            )  # fmt: skip
            # libvirt names a domain's AppArmor profile after the domain's UUID. Both daemons may
            # have the same domain, so each daemon needs its own AppArmor namespace.
            words = ["aa-exec", "-n", host_namespace(self._host), "-p", "unconfined", "--",
                     "unshare", "--mount", "--uts", "sh", "-ec", script]  # fmt: skip
        if self._systemd is not None:
            scope = ["systemd-run", "--scope", "--quiet", "--unit=libvirtd", "-p", "Delegate=yes"]
            words = [*self._systemd.enter, *scope, *words]
        log = open(f"/tmp/libvirtd-{self._host or 'main'}.log", "ab")  # noqa: SIM115 # nosec B108
        with log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if self._host is not None:
            self.root = Path(f"/proc/{self._process.pid}/root")
        wait_until(self._answers, "libvirtd responds")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            log = Path(f"/tmp/libvirtd-{self._host or 'main'}.log").read_text()  # nosec B108
            raise LibvirtdError(f"libvirtd exited with {self._process.returncode}", log[-3000:])
        return self.virsh("uri", check=False).returncode == 0

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop the daemon, whose domains continue to run."""
        if self._process is not None:
            if self._systemd is not None:  # the started process is nsenter, not libvirtd
                words = ("systemctl", "kill", f"--signal={number}", "libvirtd.scope")
                self._systemd.run(*words)
            else:
                self._process.send_signal(number)
            self._process.wait(60)
            self._process = None

    def restart(self, number: int = signal.SIGTERM) -> None:
        self.stop(number)
        self.start()

    def virsh(
        self, *arguments: str, check: bool = True, timeout: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """Run virsh with this daemon, and return the completed process."""
        done = subprocess.run(
            ["virsh", "--quiet", "--connect", self.uri, *arguments],
            capture_output=True, text=True, check=False, timeout=timeout,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise LibvirtdError(f"virsh {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def define(self, xml: str) -> None:
        path = Path(f"/tmp/{uuid.uuid4()}.xml")  # nosec B108
        path.write_text(xml)
        try:
            self.virsh("define", str(path))
        finally:
            path.unlink()


# Hide the first daemon's files: mount a tmpfs or a copy over every directory that libvirtd uses.
_OTHER_HOST = """
hostname {host}
mount --make-rprivate /
for d in /run/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt {serials}; do
    mkdir -p $d; mount -t tmpfs tmpfs $d
done
for d in libvirt apparmor.d/libvirt; do
    mkdir -p /run/etc-{host}/$d
    cp -r /etc/$d/. /run/etc-{host}/$d
    mount --bind /run/etc-{host}/$d /etc/$d
done
echo 'host_uuid = "{host_uuid}"' >/etc/libvirt/libvirtd.conf
printf %s {conf} >/etc/libvirt/qemu.conf
mkdir -p /var/lib/libvirt/qemu /run/libvirt/qemu
chown libvirt-qemu:libvirt-qemu /var/lib/libvirt/qemu
chmod 755 /var/lib/libvirt/qemu {serials}
exec /usr/sbin/libvirtd --pid-file /run/libvirtd-{host}.pid
"""


class Systemd:
    """A context manager that runs systemd as PID 1 of a new PID namespace.

    This systemd runs only the targets on which services depend, and the journal. Unlike systemd on
    a full Debian, this systemd does not set up devices, clocks, users or D-Bus. ``/run`` is
    separate, except for the directories that libvirtd and the tests share.

    :ivar enter: The arguments to prepend to a command, so that the command runs in the namespaces.
    """

    def __init__(self) -> None:
        self._log = Path("/tmp/systemd.log")  # nosec B108
        _prepare_machine()
        script = _SYSTEMD.format(serials=SERIALS)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["unshare", "--fork", "--pid", "--mount", "--kill-child", "sh", "-ec", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.enter: list[str] = []
        try:
            wait_until(self._is_up, "systemd is up")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # --kill-child then kills PID 1, and so all processes in the namespace
        self._process.wait()

    def _is_up(self) -> bool:
        if self._process.poll() is not None:
            raise LibvirtdError("systemd has exited", self._log.read_text()[-3000:])
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        if not (pids := children.read_text().split()):
            return False
        if not Path(f"/proc/{pids[0]}/root/run/systemd/private").exists():
            return False
        # nsenter does not change a process's cgroup. In the cgroup namespace, the cgroup's path is
        # "/..", which libvirt and systemd do not support. Move the process to systemd's cgroup.
        join = 'echo 0 >/sys/fs/cgroup/init.scope/cgroup.procs; exec "$@"'
        self.enter = ["nsenter", "--target", pids[0], "--all", "sh", "-c", join, "sh"]
        return self.run("systemctl", "is-system-running", check=False).strip() in (
            "running",
            "degraded",
        )

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command in the namespaces and return its stdout."""
        done = subprocess.run(
            [*self.enter, *words], capture_output=True, text=True, check=False, timeout=300,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise LibvirtdError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout


# The cgroup of the process that creates the cgroup namespace becomes the namespace's root. This
# cgroup must contain only systemd.
_SYSTEMD = """
mkdir -p /sys/fs/cgroup/systemd /tmp/systemd/units/sysinit.target.wants
echo 0 >/sys/fs/cgroup/systemd/cgroup.procs
cd /usr/lib/systemd/system
cp basic.target sysinit.target shutdown.target systemd-journald.service systemd-journald.socket \
    systemd-journald-dev-log.socket /tmp/systemd/units
ln -sf ../systemd-journald.service /tmp/systemd/units/sysinit.target.wants
cd /
for d in libvirt {serials.name}; do
    mkdir -p /tmp/systemd/$d
    mount --bind /run/$d /tmp/systemd/$d
done
mount -t tmpfs -o mode=755 run /run
for d in libvirt {serials.name}; do
    mkdir /run/$d
    mount --move /tmp/systemd/$d /run/$d
done
mount -t proc proc /proc
export container=lab
export SYSTEMD_UNIT_PATH=/tmp/systemd/units:/etc/systemd/system:/run/systemd/transient
export SYSTEMD_GENERATOR_PATH=/tmp/systemd/none SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/tmp/systemd/none
exec unshare --cgroup sh -ec '
    umount /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    exec /usr/lib/systemd/systemd --unit=basic.target --show-status=no
'
"""


def _prepare_machine() -> None:
    """Create the files that udev, systemd and systemd-tmpfiles usually create."""
    # As udev does. L1 has no other users.
    os.chmod("/dev/kvm", 0o666)  # nosec B103
    SERIALS.mkdir(exist_ok=True)
    SERIALS.chmod(0o755)
    Path("/run/libvirt").mkdir(exist_ok=True)
    if not Path("/sys/kernel/security/apparmor").exists():
        subprocess.run(
            ["mount", "-t", "securityfs", "securityfs", "/sys/kernel/security"], check=True
        )


def host_namespace(host: str) -> str:
    """Return the name of the AppArmor policy namespace of a simulated host."""
    return f"lab-{host}"


def _load_profiles(host: str | None) -> None:
    where = ["--namespace", host_namespace(host)] if host else []
    for name in PROFILES:
        words = ["apparmor_parser", *where, "--replace", f"/etc/apparmor.d/{name}"]
        subprocess.run(words, check=True, timeout=300)


class LabDomain:
    """A persistent domain that boots the lab's guest.

    :param workload_mib: MiB that the guest writes before it is ready. 0 means none.
    :param max_mib: The maximum memory in MiB, for memory hotplug. 0 disables memory hotplug.
    :param firmware_only: Boot no kernel, so that the guest stays in its firmware.
    :param edit: A function that gets the generated XML and returns the XML that defines the domain.
    """

    def __init__(
        self,
        daemon: Libvirtd,
        name: str,
        *,
        machine: str = "pc",
        memory_mib: int = 192,
        workload_mib: int = 0,
        max_mib: int = 0,
        firmware_only: bool = False,
        kernel_args: str = "",
        metadata: str = "",
        edit: Any = None,
    ) -> None:
        self.daemon = daemon
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.serial_path = SERIALS / name
        self._serial: Serial | None = None
        append = f"{KERNEL_ARGS} {kernel_args}"
        if workload_mib:
            append += f" workload.mib={workload_mib}"
        files = l2_directory()
        boot = (
            f"<kernel>{files}/vmlinux</kernel><initrd>{files}/initramfs</initrd>"
            f"<cmdline>{append}</cmdline>"
        )
        kib = memory_mib << 10
        cpu = "<cpu mode='host-passthrough' check='none'/>"
        plug = ""
        if max_mib:
            plug = f"<maxMemory slots='2' unit='MiB'>{max_mib}</maxMemory>"
            cpu = cpu.replace("/>", f"><numa><cell id='0' cpus='0' memory='{kib}'/></numa></cpu>")
        xml = f"""<domain type='kvm'>
  <name>{name}</name>
  <uuid>{self.uuid}</uuid>
  {metadata}{plug}
  <memory unit='KiB'>{kib}</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='{machine}'>hvm</type>{"" if firmware_only else boot}</os>
  <features><acpi/></features>
  {cpu}
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='unix'><source mode='bind' path='{self.serial_path}'/></serial>
  </devices>
</domain>
"""
        if edit is not None:
            xml = edit(xml.encode()).decode()
        daemon.define(xml)
        daemon.domains.append(self)

    # virsh.

    def virsh(self, command: str, *arguments: str, **options: Any) -> str:
        """Run a virsh command on this domain and return its stdout."""
        return self.daemon.virsh(command, self.name, *arguments, **options).stdout.strip()

    @property
    def state(self) -> str:
        return self.virsh("domstate")

    def destroy(self) -> None:
        """Destroy and undefine the domain."""
        if self._serial is not None:
            self._serial.close()
            self._serial = None
        for command in (("destroy",), ("undefine", "--managed-save")):
            self.daemon.virsh(command[0], self.name, *command[1:], check=False)

    def moved_to(self, daemon: Libvirtd) -> LabDomain:
        """Return an object for this domain on the daemon to which the domain migrated."""
        moved = copy.copy(self)
        moved.daemon = daemon
        moved._serial = None
        daemon.domains.append(moved)
        return moved

    def reset(self) -> None:
        """Reset the guest and discard the output of its previous boot.

        This method pauses the guest during the reset, so that no output of the new boot is
        discarded.
        """
        assert self._serial is not None
        self.virsh("suspend")
        self._serial.forget()
        self.virsh("reset")
        self.virsh("resume")

    def log(self) -> str:
        """Return the domain's log, which libvirt and QEMU write."""
        path = self.daemon.root / f"var/log/libvirt/qemu/{self.name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    # QEMU and its guest.

    @property
    def process(self) -> Process:
        """The process of the domain's QEMU."""
        if self.daemon.root == Path("/"):
            return find_qemu(self.name, self.uuid)
        pid = (self.daemon.root / f"run/libvirt/qemu/{self.name}.pid").read_text()
        return Process.find(int(pid))

    def faults(self) -> int:
        """Return the number of faults (KVM's ``pf_taken``) since this QEMU started."""
        count = debugfs_faults(self.process)
        if count is None:
            raise LibvirtdError("KVM's counters are not in debugfs")
        return count

    def attach_serial(self) -> Serial:
        """Connect to the serial line of the domain's current QEMU."""
        if self._serial is not None:
            self._serial.close()
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(30)
        line.connect(str(self.daemon.root / self.serial_path.relative_to("/")))
        self._serial = Serial(line, self._make_error)
        return self._serial

    def _make_error(self, cause: str) -> LibvirtdError:
        said = self._serial.log[-2000:] if self._serial else b""
        return LibvirtdError(cause, f"{self.log()[-3000:]}\nserial: {said!r}")

    def start(self, *arguments: str) -> None:
        """Run ``virsh start`` and connect to the serial line."""
        self.virsh("start", *arguments)
        self.attach_serial()

    def wait_ready(self, timeout: float = 300.0) -> Answer:
        assert self._serial is not None
        return self._serial.answer("ready", timeout)

    def command(self, line: str, timeout: float = 300.0) -> Answer:
        assert self._serial is not None
        return self._serial.command(line, timeout)

    def check_memory(self) -> None:
        """Check that the guest responds and that its memory is unchanged."""
        answer = self.command("pass")
        if answer["bad"]:
            raise LibvirtdError(f"{answer['bad']} pages of {self.name} have changed")


def denials(since: int) -> list[str]:
    """Return AppArmor's denials in the kernel log after the first ``since`` lines."""
    lines = kernel_log()[since:]
    return [line for line in lines if 'apparmor="DENIED"' in line]


def kernel_log() -> list[str]:
    done = subprocess.run(["dmesg"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


class Syslog:
    """A context manager that collects log messages from a socket at ``/dev/log``."""

    def __init__(self, path: Path = Path("/dev/log")) -> None:
        self._path = path
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._socket.bind(str(path))
        path.chmod(0o666)
        self._socket.settimeout(0)
        self._lines: list[str] = []

    def __enter__(self) -> Syslog:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._path.unlink()

    def lines(self, having: str = "") -> list[str]:
        """Return the messages received so far that contain the string ``having``."""
        with contextlib.suppress(BlockingIOError):
            while data := self._socket.recv(1 << 16):
                self._lines.append(data.decode(errors="replace"))
        return [line for line in self._lines if having in line]
