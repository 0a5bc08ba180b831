"""Build entry point; metadata stands in pyproject.toml. Says in one line where megatron-core has no wheels."""

import platform
import sys

from setuptools import setup

if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
    raise SystemExit(
        f"megatron_xy needs Linux (glibc >= 2.28) on x86_64 or aarch64, for which megatron-core has wheels; "
        f"this is {sys.platform} on {platform.machine()}. A Linux container or virtual machine will do."
    )

setup()
