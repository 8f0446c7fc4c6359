# SPDX-License-Identifier: GPL-2.0-or-later
# mmdebstrap hook: distro-hook.sh essential|customize ROOT PASSWORD
#
# Set what an installer would ask for, and disable services that disturb measurements.
set -e
stage=$1 root=$2 password=$3
case $stage in
essential)
	# Installing the kernel makes the initramfs. Include few drivers: unpacking an initramfs
	# with all drivers takes longer under TCG than the rest of the boot.
	mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
	printf 'MODULES=list\nCOMPRESS=gzip\nRESUME=none\n' >"$root/etc/initramfs-tools/conf.d/small"
	printf '%s\n' virtio_pci virtio_mmio virtio_blk ext4 \
		>"$root/usr/share/initramfs-tools/modules.d/guest"
	;;
customize)
	echo "root:$password" | chroot "$root" chpasswd
	echo guest >"$root/etc/hostname"
	# Without a machine id, systemd treats the first boot as a first installation: it asks
	# questions and applies presets.
	chroot "$root" systemd-machine-id-setup >/dev/null 2>&1
	# These timers maintain a permanent installation. They could expire during a measurement.
	chroot "$root" systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer \
		dpkg-db-backup.timer fstrim.timer e2scrub_all.timer e2scrub_reap.service 2>/dev/null || true
	# systemd's default time limit for devices and services is 90 seconds. On a busy host, an
	# emulated guest may get so little CPU time that its console's device exceeds this limit.
	mkdir -p "$root/etc/systemd/system.conf.d"
	printf '[Manager]\nDefaultTimeoutStartSec=1h\nDefaultDeviceTimeoutSec=1h\n' \
		>"$root/etc/systemd/system.conf.d/patient.conf"
	# Some of systemd's services have limits of their own, also of 90 seconds, and watchdogs.
	mkdir -p "$root/etc/systemd/system/service.d"
	printf '[Service]\nTimeoutStartSec=1h\nWatchdogSec=0\n' \
		>"$root/etc/systemd/system/service.d/patient.conf"
	echo event_timeout=3600 >>"$root/etc/udev/udev.conf"
	;;
esac
