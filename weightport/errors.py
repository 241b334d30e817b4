"""Errors that a user can act on: one line that names the file, the reason and what to do."""


class ConversionError(Exception):
    """A file cannot be read, recognised, converted or written. The message is one line, ready to
    print."""


def printable(text: object, limit: int = 120) -> str:
    """Text from an untrusted file, made safe to print: control characters escaped, length
    bounded."""
    escaped = str(text)
    if not escaped.isprintable():
        escaped = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped)
    return escaped if len(escaped) <= limit else escaped[: limit - 1] + "…"
