# SPDX-License-Identifier: GPL-2.0-or-later
# mmdebstrap hook: distro-hook.sh essential|customize ROOT PASSWORD
#
# What an installer would have asked for. The rest is as the packages made it.
set -e
stage=$1 root=$2 password=$3
case $stage in
essential)
	# The initramfs is made when the kernel is installed. With every driver it takes longer
	# to unpack under TCG than the rest of the boot.
	mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
	printf 'MODULES=list\nCOMPRESS=gzip\nRESUME=none\n' >"$root/etc/initramfs-tools/conf.d/small"
	printf '%s\n' virtio_pci virtio_mmio virtio_blk ext4 \
		>"$root/usr/share/initramfs-tools/modules.d/guest"
	;;
customize)
	echo "root:$password" | chroot "$root" chpasswd
	echo guest >"$root/etc/hostname"
	# Without an identity the first boot is one of questions and presets.
	chroot "$root" systemd-machine-id-setup >/dev/null 2>&1
	# Work for a machine that stays: it would begin at some moment of a measurement.
	chroot "$root" systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer \
		dpkg-db-backup.timer fstrim.timer e2scrub_all.timer e2scrub_reap.service 2>/dev/null || true
	# systemd gives devices and services a minute and a half. A guest whose emulated CPU waits
	# for the host's spends it without having run, and is then left without its console.
	mkdir -p "$root/etc/systemd/system.conf.d"
	printf '[Manager]\nDefaultTimeoutStartSec=1h\nDefaultDeviceTimeoutSec=1h\n' \
		>"$root/etc/systemd/system.conf.d/patient.conf"
	echo event_timeout=3600 >>"$root/etc/udev/udev.conf"
	;;
esac
