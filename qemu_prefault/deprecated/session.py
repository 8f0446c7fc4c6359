# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``Session`` and ``Policy`` classes of version 0.1."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self

from ..engine.options import AgentChoice, Options
from ..engine.report import Report
from ..engine.run import prefault
from ..engine.vm import Vm
from ..libvirt.qmp_proxy import connect_vm
from ..qemu.queries import VmState


class Policy(Options):
    """The :class:`Options` class under its name in version 0.1."""

    def __new__(cls, *_: object, **__: object) -> Self:
        _warn("Policy", "Options")
        return super().__new__(cls)


class Session(Vm):
    """The :class:`Vm` class under its name and with its methods in version 0.1."""

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, qmp: str, pid: int | None = None) -> AsyncIterator[Session]:
        """Connect to QEMU at a QMP socket, or through libvirt for ``libvirt:DOMAIN``."""
        _warn("Session", "connect() and prefault_async()")
        if qmp.startswith("libvirt:"):
            opened = connect_vm(qmp.removeprefix("libvirt:"), pid)
        else:
            opened = Vm.connect(qmp, pid)
        async with opened as vm:
            yield cls(vm.monitor, vm.process, vm.state)

    @property
    def machine(self) -> VmState:
        """The :attr:`state` attribute under its name in version 0.1."""
        return self.state

    async def prefault(
        self,
        policy: Options | None = None,
        *,
        cont: bool = False,
        incoming: bool = False,
        on_ready: Callable[[], Awaitable[None]] | None = None,
        dry_run: bool = False,
        agent: str = "auto",
    ) -> Report:
        """Prefault the guest like :func:`qemu_prefault.prefault_async`."""
        given = policy or Options()
        options = Options(
            populate=given.populate,
            ranges=given.ranges,
            max_bytes=given.max_bytes,
            vcpus=given.vcpus,
            populate_only=given.populate_only,
            force=given.force,
            chunk_bytes=given.chunk_bytes,
            max_downtime=given.max_downtime,
            cont=cont,
            incoming=incoming,
            dry_run=dry_run,
            agent=AgentChoice(agent),
        )
        return await prefault(self, options, on_ready=on_ready)


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"qemu_prefault.{old} is deprecated and will be removed after version 0.2. "
        f"Use qemu_prefault's {new}",
        DeprecationWarning,
        stacklevel=3,
    )
