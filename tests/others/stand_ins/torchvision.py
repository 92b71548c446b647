"""Stands in for torchvision where that cannot be imported: timm names much of it, and its models need none of it."""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.28.0"
__path__ = []


class _Names(type):
    """Classes whose members are their own names, as those of an enumeration."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    def __getattr__(self, name):
        return __getattr__(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        is_part = name.startswith("torchvision.")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_part else None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Names(name, (), {})


sys.meta_path.insert(0, _Finder())
