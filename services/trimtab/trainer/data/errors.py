"""The one error of this package: it names the file, the line and the field, and says what is wrong there."""


class DataError(ValueError):
    """A row that cannot be used.

    Attributes:
        path: the file or hub id.
        line: 1-based line of a JSONL file or row of a Parquet file or hub set; 0 where the file itself is at fault.
        field: the field's name, with an index inside a list (`ranks[2]`); "" where the row as a whole is at fault.
        reason: what is wrong and what is expected.
    """

    def __init__(self, path: str, line: int, field: str, reason: str) -> None:
        self.path = path
        self.line = line
        self.field = field
        self.reason = reason
        place = path + (f":{line}" if line else "") + (f": {field}" if field else "")
        super().__init__(f"{place}: {reason}")


class RowError(ValueError):
    """A fault of one row, before it is known which line it came from."""

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}" if field else reason)
