"""Names for parts that a recipe can choose, and the door through which a user's own parts come in."""

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from vit_rsst.errors import InputError, unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a part of one kind; an unknown name is an error that suggests the nearest."""

    def __init__(self, kind: str):
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a part under `name`; a second part of that name is refused."""

        def add(part: T) -> T:
            if name in self._parts:
                raise InputError(f"{self.kind} {name!r} is registered twice; give one of them another name.")
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._parts:
            raise InputError(unknown(self.kind, name, self._parts))
        return self._parts[name]

    def get(self, name: str, default: T) -> T:
        """The part of that name, or the default."""
        return self._parts.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
