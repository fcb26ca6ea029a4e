"""The block that goes into a bug report: versions, hardware and findings, and nothing that says whose machine it is."""

import getpass
import platform
import re
import socket
from collections.abc import Sequence

from gemma_tune.doctor.finding import Finding, worst
from gemma_tune.doctor.packages import installed_stack
from gemma_tune.identity import installed_version
from gemma_tune.secrets import mask_private

# Names that are words of their own in a report, and say nothing about a person.
_COMMON_NAMES = {"root", "user", "admin", "ubuntu", "localhost", "python", "cuda", "torch", "gemma"}


def bug_report(findings: Sequence[Finding]) -> str:
    """Markdown to paste: no token, no user or host name, no path below a home folder."""
    versions = ", ".join(f"{name} {version}" for name, version in installed_stack().items())
    lines = [
        f"gemma-tune {installed_version('gemma-tune')}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.release()} {platform.machine()}, {platform.libc_ver()[1] or 'no'} glibc",
        versions,
        "",
        *(f"{item.verdict:4}  {item.name}: {item.found}" for item in findings),
    ]
    return f"```\ngemma-tune doctor: {worst(findings)}\n{hide_names(chr(10).join(lines))}\n```"


def hide_names(text: str) -> str:
    """The text without secrets, paths below a home folder, and the names of the user and the machine."""
    text = mask_private(text)
    host = socket.gethostname()
    for name in (host, host.partition(".")[0], _user_name()):
        if len(name) >= 3 and name.lower() not in _COMMON_NAMES:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", "***", text, flags=re.IGNORECASE)
    return text


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""
