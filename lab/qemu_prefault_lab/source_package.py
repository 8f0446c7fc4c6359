# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian source packages, from the archive that apt on this host uses."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from .errors import ImageError
from .image import EXPIRING_SUITES
from .steps import need, run_step

log = logging.getLogger(__name__)

_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"


def unpack(
    work: Path, suite: str, package: str, fits: Callable[[str], bool], *, upstream: bool = False
) -> Path:
    """Download a source package, unpack it and return the directory with the source.

    :param work: An existing directory for the download and the source.
    :param fits: A function that returns whether a Debian version is suitable. The newest suitable
        version is used.
    :param upstream: Unpack only the upstream tarball, without Debian's patches.
    :raises ImageError: If the suite has no suitable version, or a step failed.
    """
    apt = work / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    # Use only this suite, and ignore the suites that are enabled on the host.
    expired = "no" if suite in EXPIRING_SUITES else "yes"
    (apt / "sources.list").write_text(
        f"deb-src [check-valid-until={expired} signed-by={_KEYRING}] {_archive()} {suite} main\n"
    )
    options = [
        *("-o", f"Dir::Etc::SourceList={apt}/sources.list"),
        *("-o", "Dir::Etc::SourceParts=/dev/null"),
        *("-o", f"Dir::State::Lists={apt}/lists"),
        *("-o", f"Dir::Cache={apt}"),
        *("-o", "APT::Sandbox::User="),
        *("-o", "Acquire::Languages=none"),
        *("-o", "Acquire::Retries=3"),
    ]
    log.info("downloading the source of %s (Debian %s)", package, suite)
    run_step(["apt-get", *options, "-qq", "update"], "apt-get update")
    versions = [
        line.split(maxsplit=1)[1]
        for line in run_step(["apt-cache", *options, "showsrc", package], "apt-cache").splitlines()
        if line.startswith("Version:")
    ]
    fitting = [version for version in versions if fits(version)]
    if not fitting:
        raise ImageError(
            f"Debian {suite} provides versions {versions} of {package}, but the lab needs another",
            "the archive has changed; please report this",
        )
    argv = ["apt-get", *options, "-qq", "source", "--download-only"]
    argv += ["--tar-only"] if upstream else []
    run_step(
        [*argv, f"{package}={fitting[-1]}"],
        f"downloading the source of {package} {fitting[-1]}",
        work,
    )
    # apt has already verified the hashes of the files and the signature of the package list.
    source = work / "source"
    if upstream:
        source.mkdir()
        tarball = next(work.glob("*.orig.tar.*"))
        tar = ["tar", "-xf", str(tarball), "--no-same-owner", "--strip-components=1"]
        run_step([*tar, "-C", str(source)], f"unpacking {tarball.name}")
    else:
        description = next(work.glob("*.dsc"))
        argv = [need("dpkg-source", "dpkg-dev"), "--no-check", "-x", description.name, source.name]
        run_step(argv, f"unpacking the source of {package}", work)
    return source


def apply_patches(source: Path, patches: Sequence[Path]) -> None:
    """Apply patches to a source tree, in this order.

    :raises ImageError: If a patch does not apply exactly.
    """
    for patch in patches:
        log.info("applying %s", patch.name)
        argv = [need("patch", "patch"), "--forward", "--fuzz=0", "-p1", "-d", str(source)]
        run_step([*argv, "-i", str(patch.resolve())], f"applying {patch.name}")


def _archive() -> str:
    """Return the URI of the Debian archive that apt uses."""
    wanted = ["--format", "$(ORIGIN)/$(LABEL) $(REPO_URI)", "Created-By: Packages"]
    for line in run_step(["apt-get", "indextargets", *wanted], "apt-get indextargets").splitlines():
        origin, _, uri = line.partition(" ")
        if origin == "Debian/Debian":
            return uri
    raise ImageError(
        "apt on this host is not configured to use a Debian archive",
        "add a Debian archive to /etc/apt/sources.list and run apt-get update",
    )
