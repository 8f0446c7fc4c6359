# SPDX-License-Identifier: GPL-2.0-or-later
# Run once by the first process of L1: what a distribution's init would do, and no more.
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
# Made when first read: before the snapshot, so that all who restore it have the same.
cat /proc/sys/kernel/random/boot_id >/run/boot_id
ip link set lo up
# What a test needs to hold QEMU in a cgroup of its own.
echo '+memory +cpu +pids' >/sys/fs/cgroup/cgroup.subtree_control
# kvm.* and kvm_amd.* on the kernel's command line are read by modprobe. The lab stays
# useful without KVM (a TCG guest), so a kernel that refuses is reported, not fatal.
modprobe kvm_amd || echo "lab-init: modprobe kvm_amd failed"
exec python3 -S -E /lab/command_server.py lab
