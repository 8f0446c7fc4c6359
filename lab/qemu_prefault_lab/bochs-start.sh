# SPDX-License-Identifier: GPL-2.0-or-later
# The first process of an L1 in Bochs runs this script once, as start.sh in an L1 in QEMU.
set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
mkdir -p /dev/pts /dev/shm /dev/hugepages
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t hugetlbfs hugetlbfs /dev/hugepages
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs -o mode=755 run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing || true
ln -sfn /proc/self/fd /dev/fd
mkdir -p /run/lock
hostname lab
cat /proc/sys/kernel/random/boot_id >/run/boot_id
ip link set lo up
# Enable the controllers that tests need in QEMU's cgroup.
echo '+memory +cpu +pids' >/sys/fs/cgroup/cgroup.subtree_control
# modprobe applies kvm.* and kvm_intel.* from the kernel's command line.
modprobe kvm_intel || echo "lab-init: modprobe kvm_intel failed"
cd /lab
exec python3 -S -E -m server.disk_server
