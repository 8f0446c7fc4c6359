# SPDX-License-Identifier: GPL-2.0-or-later
"""Download cloud images with ``avocado.utils.vmimage`` and a provider for Alpine.

Each image must have the digest that its publisher lists beside it. The newest image has a new
digest, so this repository cannot contain the digests. The list of digests is read over https, also
if vmimage reads the image itself over http. The publishers sign the lists with their own keys. This
module does not check the signatures, because the images run only as guests of the tests.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from avocado.utils import vmimage

NETWORK_SECONDS = 60.0


class NoImageError(Exception):
    """An error whose message states why an image is not available."""


class AlpineImageProvider(vmimage.ImageProviderBase):
    """A provider of Alpine's "nocloud" images, which are not specific to one cloud.

    https://dl-cdn.alpinelinux.org/alpine/latest-stable/releases/cloud/ lists the images' file
    names.
    """

    name = "Alpine"
    index = "https://dl-cdn.alpinelinux.org/alpine/"

    def __init__(
        self, version: str = r"v\d+\.\d+", build: None = None, arch: str = vmimage.DEFAULT_ARCH
    ) -> None:
        super().__init__(version, build, arch)
        self.url_versions = self.index
        self.url_images = self.index + "{version}/releases/cloud/"
        self.image_pattern = r"nocloud_alpine-[\d.]+-{arch}-bios-cloudinit-r\d+\.qcow2$"

    @staticmethod
    def get_best_version(versions: list[str]) -> str:
        return max(versions, key=lambda version: [int(n) for n in version[1:].split(".")])


vmimage.IMAGE_PROVIDERS.add(AlpineImageProvider)


def _fedora_list(url: str) -> str:
    """Return the address of the list for .../Fedora-Cloud-Base-Generic-43-1.6.x86_64.qcow2."""
    parts = re.search(r"-(\d+)-([\d.]+)\.(\w+)\.qcow2$", url)
    if parts is None:
        raise NoImageError(f"the name of this image is unknown: {url}")
    return f"{url.rpartition('/')[0]}/Fedora-Cloud-{parts[1]}-{parts[2]}-{parts[3]}-CHECKSUM"


#: For each provider, the algorithm and a function from an image's address to that of the digests.
DIGESTS: dict[str, tuple[str, Callable[[str], str]]] = {
    "Alpine": ("sha512", lambda url: f"{url}.sha512"),
    "Fedora": ("sha256", _fedora_list),
    "OpenSUSE": ("sha256", lambda url: f"{url}.sha256"),
    "Ubuntu": ("sha256", lambda url: f"{url.rpartition('/')[0]}/SHA256SUMS"),
}


def published_digest(name: str, url: str) -> tuple[str, str]:
    """Return the algorithm and the digest that the publisher lists for an image.

    :raises NoImageError: If the list does not contain the image.
    """
    if name not in DIGESTS:
        raise NoImageError(f"the list of digests for images of {name} is unknown")
    algorithm, address_of = DIGESTS[name]
    address = re.sub("^http://(?!127\\.0\\.0\\.1[:/])", "https://", address_of(url))
    if not address.startswith("http"):
        raise NoImageError(f"this address of a list of digests is not supported: {address}")
    # urlopen() would also open file:, which the check above excludes.
    with urlopen(address) as response:  # nosec B310
        lines = response.read(1 << 20).decode(errors="replace").splitlines()
    file = url.rpartition("/")[2]
    for line in lines:
        digest = re.search(rf"\b[0-9a-f]{{{64 if algorithm == 'sha256' else 128}}}\b", line)
        if digest and re.search(rf"(^|[\s*(]){re.escape(file)}([\s)]|$)", line):
            return algorithm, digest[0]
    raise NoImageError(f"{address} contains no digest of {file}")


def base_image(name: str, cache_dir: str) -> Path:
    """Return the newest image of a distribution, downloaded unless cached.

    :raises NoImageError: If no image of the distribution is available, or if the image does not
        have the digest that its publisher lists.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        found = vmimage.Image.from_parameters(name=name, cache_dir=cache_dir)
        found.algorithm, found.checksum = published_digest(found.name, found.url)
        return Path(found.base_image)
    # vmimage raises AttributeError for an unknown name. If the download fails, it raises one of
    # the other exceptions.
    except (AttributeError, OSError, ValueError, vmimage.ImageProviderError) as error:
        raise NoImageError(f"no cloud image of {name} is available: {error}") from error
    finally:
        socket.setdefaulttimeout(before)
