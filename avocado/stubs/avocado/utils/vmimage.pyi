from typing import Self

DEFAULT_ARCH: str
IMAGE_PROVIDERS: set[type[ImageProviderBase]]

class ImageProviderError(Exception): ...

class ImageProviderBase:
    name: str
    url_versions: str
    url_images: str
    image_pattern: str
    def __init__(self, version: str, build: str | None, arch: str) -> None: ...

class Image:
    name: str
    url: str
    algorithm: str | None
    checksum: str | None
    base_image: str
    @classmethod
    def from_parameters(cls, *, name: str, cache_dir: str) -> Self: ...
