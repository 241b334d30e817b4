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


def one_line(error: Exception) -> str:
    """What any error says, in one line that is ready to print."""
    if isinstance(error, ConversionError):
        return printable(error, limit=2000)
    if isinstance(error, OSError) and error.filename:
        return f"{printable(error.filename)}: {error.strerror}"
    return f"{printable(error)} ({type(error).__name__}; run with --debug for the details)"
