"Everything about the package stands in pyproject.toml; only the version comes from settings.ini, where nbdev keeps it."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
setup(version=settings["DEFAULT"]["version"])
