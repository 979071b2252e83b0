"""Registries of the components that a recipe selects by name, open to user plugins."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vit_rsst.errors import InputError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to components of one kind; an unknown name raises an error that suggests the closest match."""

    def __init__(self, kind: str):
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a component under `name`; duplicate names raise."""

        def add(part: T) -> T:
            if name in self._parts:
                raise InputError(f"{self.kind} {name!r} is registered twice; rename one of them.")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            raise InputError(unknown(self.kind, name, self._parts))
        return self._parts[name]

    def get(self, name: str, default: T) -> T:
        """The component of that name, or the default."""
        return self._parts.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
