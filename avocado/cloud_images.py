# SPDX-License-Identifier: GPL-2.0-or-later
"""Where cloud images come from: ``avocado.utils.vmimage``, and a provider that it lacks."""

from __future__ import annotations

import socket
from pathlib import Path

from avocado.utils import vmimage

NETWORK_SECONDS = 60.0


class NoImageError(Exception):
    """There is no image of that name to be had; says why."""


class AlpineImageProvider(vmimage.ImageProviderBase):
    """Alpine's image for no particular cloud.

    How it is called: https://dl-cdn.alpinelinux.org/alpine/latest-stable/releases/cloud/
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
    """Fetch the newest image that the network has, or take it from the cache.

    :raises NoImageError: with the reason.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        found = vmimage.Image.from_parameters(name=name, cache_dir=cache_dir)
        return Path(found.base_image)
    # No image of such a name is an AttributeError, no network any of the others.
    except (AttributeError, OSError, ValueError, vmimage.ImageProviderError) as error:
        raise NoImageError(f"no cloud image of {name} to be had: {error}") from error
    finally:
        socket.setdefaulttimeout(before)
