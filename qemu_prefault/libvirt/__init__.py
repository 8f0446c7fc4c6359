# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMUs that libvirt starts: the plugin in a domain, a hook, and libvirt's own monitor.

domain_xml.py    a domain's XML, edited in place
install.py       what has to lie where: the plugin, AppArmor's rule, the hook, the unit
connection.py    libvirt itself, by libvirt-python or virsh
find_qemu.py     the QEMU of a domain, found without asking libvirt
qmp_proxy.py     a QMP server in front of libvirt's own connection to QEMU: --domain
hook_config.py   what is to be done for which domain, and when
hook.py          /etc/libvirt/hooks/qemu.d: never calls libvirt, never fails a guest
prelaunch.py     a restored guest, prefaulted before it runs, without any monitor
lifecycle.py     start, restore and migrate as one command each
daemon.py        libvirt watch: acts on libvirt's events
events.py        what the daemon hears of libvirt, and where it logs
metrics.py       metrics for Prometheus
probe.py         probe --domain: what this host lets each of these do
status.py        libvirt status: whether a domain loads the plugin
"""
