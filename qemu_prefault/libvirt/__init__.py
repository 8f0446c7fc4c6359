# SPDX-License-Identifier: GPL-2.0-or-later
"""Support for QEMU processes that libvirt starts.

domain_xml.py    Edits domain XML in place, to add or remove the plugin.
install.py       Installs the plugin, the AppArmor rule, the hook and the systemd unit.
connection.py    Connects to libvirt with libvirt-python or virsh.
find_qemu.py     Finds the QEMU process of a domain without calling libvirt.
qmp_proxy.py     Serves QMP through libvirt's connection to QEMU, for --domain.
hook_config.py   Reads the configuration of the hook and the daemon.
hook.py          Implements the hook in /etc/libvirt/hooks/qemu.d.
prelaunch.py     Prefaults a restored guest before it runs, without a monitor.
lifecycle.py     Implements libvirt start, restore and migrate.
daemon.py        Implements libvirt watch, which acts on libvirt's events.
events.py        Defines the events of the daemon, and its logger.
metrics.py       Exports metrics for Prometheus.
probe.py         Implements probe --domain.
status.py        Implements libvirt status.
"""
