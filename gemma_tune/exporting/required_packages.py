"""Packages that an export needs and a user may lack."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from gemma_tune.errors import ExportError


@dataclass(frozen=True)
class RequiredPackage:
    """A package by its module and its name on the index, and the command that installs it."""

    module: str
    name: str
    install: str


def require_packages(what: str, packages: Iterable[RequiredPackage]) -> None:
    """Raise ExportError, which says how to install it, when `what` lacks a package."""
    for package in packages:
        if importlib.util.find_spec(package.module) is None:
            raise ExportError(
                f"{what} needs the package `{package.name}`, which is not installed", hint=package.install
            )
