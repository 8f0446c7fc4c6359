# SPDX-License-Identifier: GPL-2.0-or-later
"""Download cloud images with ``avocado.utils.vmimage`` and a provider for Alpine."""

from __future__ import annotations

import socket
from pathlib import Path

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


def base_image(name: str, cache_dir: str) -> Path:
    """Return the newest image of a distribution, downloaded unless cached.

    :raises NoImageError: If no image of the distribution is available.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        found = vmimage.Image.from_parameters(name=name, cache_dir=cache_dir)
        return Path(found.base_image)
    # vmimage raises AttributeError for an unknown name. If the download fails, it raises one of
    # the other exceptions.
    except (AttributeError, OSError, ValueError, vmimage.ImageProviderError) as error:
        raise NoImageError(f"no cloud image of {name} is available: {error}") from error
    finally:
        socket.setdefaulttimeout(before)
