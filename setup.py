"""Hands the requirement lists of settings.ini to setuptools; the package's identity is in pyproject.toml."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

lists = ConfigParser(delimiters="=")
lists.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")


def names(section: str, key: str) -> list[str]:
    """The requirement strings under `key` of `section`, one a line in settings.ini."""
    return lists[section][key].split()


setup(
    packages=find_packages(include=["expnet", "expnet.*"]),
    package_data={"expnet": ["models/*.safetensors", "cli/*.html"]},
    install_requires=names("requirements", "core"),
    extras_require={extra: names("extras", extra) for extra in lists["extras"]},
)
