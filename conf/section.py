"""What every section of a configuration is: a dataclass that is filled, then frozen."""

import dataclasses


class Fixed(dict):
    """A dictionary of a frozen configuration: it can be read, copied and pickled, not changed."""

    def _refuse(self, *_, **__):
        raise dataclasses.FrozenInstanceError("a dictionary of a frozen configuration: use dataclasses.replace before the run starts")

    __setitem__ = __delitem__ = __ior__ = update = pop = popitem = clear = setdefault = _refuse

    def __reduce__(self):
        return type(self), (dict(self),)


class Section:
    """A dataclass that refuses assignment after `freeze()`: mutable while it is filled, constant once resolved."""

    def freeze(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, dict):
                for item in value.values():
                    item.freeze() if isinstance(item, Section) else None
                object.__setattr__(self, f.name, Fixed(value))
            elif isinstance(value, Section):
                value.freeze()
            elif isinstance(value, list):
                object.__setattr__(self, f.name, tuple(value))
        object.__setattr__(self, "_frozen", True)
        return self

    def __setattr__(self, name, value):
        if getattr(self, "_frozen", False):
            raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{name} is fixed: use dataclasses.replace before the run starts")
        object.__setattr__(self, name, value)
