# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMUs that libvirt starts: the plugin in a domain, a hook, and libvirt's own monitor.

domain_xml.py    a domain's XML, edited in place
installation.py  what has to lie where: the plugin, AppArmor's rule, the hook, the unit
connection.py    libvirt itself, by libvirt-python or virsh
bridge.py        a QMP server in front of libvirt's own connection to QEMU: --domain
policy.py        what is to be done for which domain, and when
hook.py          /etc/libvirt/hooks/qemu.d: never calls libvirt, never fails a guest
window.py        a restored guest, prefaulted before it runs, without any monitor
moments.py       start, restore and migrate as one command each
watch.py         a daemon: libvirt's events, and metrics for Prometheus
host.py          probe --domain: what this host lets each of these do
commands.py      the command line of all this
"""
