"""Versions of this project and of what it stands on, without importing any of it."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("ipfm", "torch", "triton", "deepspeed")


def installed(package: str) -> str:
    """Its version, or "not installed"; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
