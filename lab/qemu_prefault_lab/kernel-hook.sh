# SPDX-License-Identifier: GPL-2.0-or-later
# mmdebstrap customize hook: kernel-hook.sh ROOT PACKAGE DRIVER...
#
# Unpack the kernel without installing it. An installation needs initramfs-tools, and spends most
# of the build's time on an initramfs that the lab does not use. Keep only the drivers under
# drivers/DRIVER, because the drivers are most of a kernel package.
set -e
root=$1 package=$2
shift 2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
# Up to Debian 13, the kernel is one package. Later kernels have separate packages for the image,
# the binary and the modules.
names=$(apt-get -qq --print-uris --no-install-recommends install "$package" |
	sed -n "s/^'[^']*' \(linux-[a-z]*-[^_]*\)_.*/\1/p")
apt-get -qq -o APT::Sandbox::User=root download $names
mkdir tree
for deb in *.deb; do
	dpkg-deb -x "$deb" tree
done
if [ ! -d tree/usr/lib/modules ]; then
	mkdir -p tree/usr/lib
	mv tree/lib/modules tree/usr/lib/
fi
set -f
set -- $(printf "! -path */kernel/drivers/%s* " "$@")
find tree/usr/lib/modules -path '*/kernel/drivers/*' -type f "$@" -delete
set +f
image=$(find tree -name 'vmlinuz*' -type f | head -n 1)
release=$(ls tree/usr/lib/modules)
mkdir -p "$root/boot" "$root/usr/lib/modules"
cp "$image" "$root/boot/vmlinuz-$release"
cp -r "tree/usr/lib/modules/$release" "$root/usr/lib/modules/"
chroot "$root" depmod "$release"
