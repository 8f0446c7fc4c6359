# SPDX-License-Identifier: GPL-2.0-or-later
"""Connect to libvirt with libvirt-python, or access definitions with virsh."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from ..errors import (
    Code,
    InputError,
    LibvirtError,
    UnsupportedError,
)

if TYPE_CHECKING:
    import libvirt

DEFAULT_URI = "qemu:///system"


def default_uri(uri: str | None = None) -> str:
    """Return ``uri``, or $LIBVIRT_DEFAULT_URI, or the system daemon's URI."""
    return uri or os.environ.get("LIBVIRT_DEFAULT_URI") or DEFAULT_URI


def module() -> Any:
    """Import libvirt-python, and return its module.

    :raises UnsupportedError: If libvirt-python is not installed.
    """
    try:
        import libvirt  # noqa: PLC0415
    except ImportError:
        raise UnsupportedError(
            "this command needs libvirt's Python module, which is not installed",
            "install it with pip install 'qemu-prefault[libvirt]' or apt-get install "
            "python3-libvirt. A virtual environment contains the python3-libvirt package only if "
            "the environment was created with --system-site-packages",
            code=Code.NO_LIBVIRT_PYTHON,
        ) from None
    # Without a handler, libvirt prints every error to stderr.
    libvirt.registerErrorHandler(lambda _, __: None, None)
    return libvirt


def connect(uri: str | None = None) -> libvirt.virConnect:
    """Connect to libvirt, and return the connection.

    :raises LibvirtError: If libvirt's daemon does not respond.
    """
    name = default_uri(uri)
    with errors(f"{name}: "):
        return module().open(name)


@contextlib.contextmanager
def errors(prefix: str = "") -> Iterator[None]:
    """Convert libvirt's errors in the block to this package's errors."""
    libvirt = module()
    try:
        yield
    except libvirt.libvirtError as error:
        raise_error(error, prefix)


def raise_error(error: Any, prefix: str = "") -> NoReturn:
    """Raise this package's error for a ``libvirt.libvirtError``."""
    libvirt = module()
    text = f"{prefix}{error.get_error_message() or error}"
    number = error.get_error_code()
    if number == libvirt.VIR_ERR_NO_DOMAIN:
        raise InputError(text, "list the domains: virsh list --all", code=Code.NO_DOMAIN) from error
    if number == libvirt.VIR_ERR_OPERATION_INVALID:
        raise LibvirtError(text, "check the domain's state: virsh domstate DOMAIN") from error
    if number in (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_SYSTEM_ERROR):
        remedy = (
            "start the daemon: systemctl start libvirtd (or virtqemud); "
            "or specify its address: export LIBVIRT_DEFAULT_URI=URI"
        )
        raise LibvirtError(text, remedy, code=Code.NO_LIBVIRTD) from error
    raise LibvirtError(text, "see the daemon's log: journalctl -u libvirtd") from error


def lookup(connection: libvirt.virConnect, name: str) -> libvirt.virDomain:
    """Return the domain with this name, UUID or id.

    :raises InputError: If the domain does not exist.
    """
    libvirt = module()
    with errors():
        if name.isdecimal():
            with contextlib.suppress(libvirt.libvirtError):
                return connection.lookupByID(int(name))
        with contextlib.suppress(libvirt.libvirtError):
            return connection.lookupByUUIDString(name)
        return connection.lookupByName(name)


# --- definitions ---


class Definitions(Protocol):
    """The interface through which the commands access domain definitions."""

    def read(self, domain: str) -> bytes:
        """Return the persistent XML, including the secrets that :meth:`write` needs."""
        ...

    def write(self, domain: str, xml: bytes) -> None:
        """Define the domain from XML."""
        ...

    def running(self, domain: str) -> bool:
        """Return whether the domain is running."""
        ...

    def saved(self, domain: str) -> bool:
        """Return whether the domain has a managed save image."""
        ...


def definitions(uri: str | None = None) -> Definitions:
    """Return :class:`ByModule` if libvirt-python is installed, else :class:`ByVirsh`.

    :raises UnsupportedError: If neither libvirt-python nor virsh is installed.
    """
    try:
        module()
    except UnsupportedError as error:
        virsh = shutil.which("virsh")
        if virsh is None:
            raise UnsupportedError(
                "neither virsh nor libvirt's Python module is installed",
                "install virsh with apt-get install libvirt-clients, or edit the XML in a file: "
                "qemu-prefault libvirt enable - <old.xml >new.xml",
                code=Code.NO_LIBVIRT,
            ) from error
        return ByVirsh(virsh, default_uri(uri))
    return ByModule(connect(uri))


class ByModule:
    """An implementation of :class:`Definitions` that uses libvirt-python."""

    def __init__(self, connection: libvirt.virConnect) -> None:
        self._connection = connection

    def read(self, domain: str) -> bytes:
        libvirt = module()
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        found = lookup(self._connection, domain)
        with errors():
            if not found.isPersistent():
                raise InputError(
                    f"domain {domain} is transient, so it has no definition to change",
                    "edit the XML from which the domain is created: "
                    "qemu-prefault libvirt enable - <old.xml >new.xml",
                )
            return str(found.XMLDesc(flags)).encode()

    def write(self, domain: str, xml: bytes) -> None:
        with errors():
            self._connection.defineXML(xml.decode())

    def running(self, domain: str) -> bool:
        with errors():
            return bool(lookup(self._connection, domain).isActive())

    def saved(self, domain: str) -> bool:
        with errors():
            return bool(lookup(self._connection, domain).hasManagedSaveImage(0))


class ByVirsh:
    """An implementation of :class:`Definitions` that uses virsh."""

    def __init__(self, virsh: str, uri: str) -> None:
        self._command = [virsh, "--quiet", "--connect", uri]

    def _run(self, *arguments: str) -> str:
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(
            [*self._command, *arguments],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        if done.returncode == 0:
            return done.stdout
        text = " ".join(done.stderr.split()).removeprefix("error: ")
        raise LibvirtError(
            text or f"virsh {arguments[0]} failed",
            "check that libvirt responds, and that it lists the domain: virsh list --all",
        )

    def _run_on(self, domain: str, *arguments: str) -> str:
        try:
            return self._run(*arguments, domain)
        except LibvirtError as error:
            if not self._knows(domain):
                raise InputError(error.cause, error.remedy) from error
            raise

    def _knows(self, domain: str) -> bool:
        """Return whether a domain has this name or UUID.

        Return True if ``domain`` is a number, or if virsh cannot list the domains.
        """
        try:
            names = self._run("list", "--all", "--name") + self._run("list", "--all", "--uuid")
        except LibvirtError:
            return True
        return domain.isdecimal() or domain in map(str.strip, names.splitlines())

    def read(self, domain: str) -> bytes:
        return self._run_on(domain, "dumpxml", "--inactive", "--security-info").encode()

    def write(self, domain: str, xml: bytes) -> None:
        with tempfile.NamedTemporaryFile(suffix=".xml") as file:  # mode 0600
            file.write(xml)
            file.flush()
            self._run("define", file.name)

    def running(self, domain: str) -> bool:
        return self._run_on(domain, "domstate").split()[:1] != ["shut"]

    def saved(self, domain: str) -> bool:
        words = self._run_on(domain, "dominfo").splitlines()
        return any(w.startswith("Managed save:") and w.endswith("yes") for w in words)
