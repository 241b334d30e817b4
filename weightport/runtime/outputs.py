"""What calls return: named fields that are a dict too; with `return_dict=False` a plain tuple."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, NoReturn, Self


class Output(dict[str, Any]):
    """The base of outputs, which are dataclasses with `eq=False`.

    A field is an attribute and a key; one that is None is no key. An index that is a number or a
    slice counts the keys.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None:
                super().__setitem__(name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if value is not None:
            super().__setitem__(name, value)
        elif name in self:
            super().__delitem__(name)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"the fields of a {type(self).__name__} stay; set one to None")

    __delitem__ = __delattr__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are not None, in their order."""
        return tuple(self.values())

    @classmethod
    def asked(cls, return_dict: bool, *values: Any) -> Self:
        """The output with these fields, or with `return_dict=False` a plain tuple of those that are
        not None, which type checkers do not see."""
        if return_dict:
            return cls(*values)
        return tuple(value for value in values if value is not None)  # type: ignore[return-value]
