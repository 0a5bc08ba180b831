"""What a JSON value is, in the words of messages about values of a wrong kind."""

_KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def json_kind(value: object) -> str:
    """ "an object", "a list", "a string", "a boolean", "null" or "a number"."""
    return _KINDS.get(type(value), "a number")
